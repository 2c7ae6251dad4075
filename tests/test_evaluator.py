"""The evaluator as a user runs it, on emoji drawings; what it answers to bad files; and Inception's layers, on random weights."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit import evaluator
from tstitch.cli import run
from tstitch.errors import InputError
from tstitch.metrics import __main__ as program
from tstitch.metrics import precision_recall
from tstitch.metrics.evaluate import evaluate, measure, sample_settings
from tstitch.metrics.extractors import Extractor, ImageFeatures, create_extractor, load_reference_statistics
from tstitch.metrics.npz import Batch
from tstitch.presets import ROOT
from tstitch.results import comparison_table

SETTINGS = {"settings": {"solver": "DDIM", "num_steps": 20, "spacing": "uniform", "cfg_scale": 2.0, "cfg_channels": "all"}, "weights": {"vae": "ab"}}


@pytest.fixture(scope="module")
def drawings() -> np.ndarray:
    with np.load(ROOT / "assets" / "emoji" / "sample64.npz") as sample:
        return sample["image"]


@pytest.fixture
def files(tmp_path: Path, drawings: np.ndarray) -> tuple[Path, Path]:
    """A reference and a sample file of 30 drawings each, the second with its settings."""
    np.savez(tmp_path / "ref.npz", drawings[:30])
    np.savez(tmp_path / "samples.npz", drawings[-30:])
    (tmp_path / "samples.json").write_text(json.dumps(SETTINGS))
    return tmp_path / "ref.npz", tmp_path / "samples.npz"


def emoji(*arguments: object) -> None:
    evaluator.main([str(a) for a in arguments] + ["--extractor", "emoji", "--device", "cpu"])


class Histogram(Extractor):
    """Features in closed form: mean colour, the first pixel's red, and probabilities of the colours."""

    name, dim, spatial_dim, distance, score, weights = "histogram", 3, 1, "fd", "is", "none"

    def measure(self, images: torch.Tensor) -> ImageFeatures:
        images = images.double()
        pool = images.mean(dim=(2, 3))
        return ImageFeatures(pool, images[:, :1, 0, 0], (pool / 50).softmax(dim=1))


def test_two_files_in_and_a_result_with_its_settings_out(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    emoji(*files, "--json", tmp_path / "out" / "result.json")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["metrics"]["fd_emoji"] > 0.1 and 0 <= result["metrics"]["precision"] <= 1 and 0 <= result["metrics"]["recall"] <= 1
    expected = {"solver": "DDIM", "num_steps": 20, "vae": "ab", "num_images": 30, "extractor": "emoji", "precision_recall_images": [30, 30]}
    assert expected.items() <= result["settings"].items()
    assert len(result["settings"]["reference"]) == 16
    assert not list((tmp_path / "out").glob(".*"))
    assert f"{result['metrics']['fd_emoji']:.3f}" in capsys.readouterr().out


def test_the_numbers_are_those_of_all_features_at_once(files: tuple[Path, Path], drawings: np.ndarray) -> None:
    extractor = create_extractor("emoji")
    result, got = evaluate(*files, extractor, batch_size=7)
    features = [extractor(torch.from_numpy(part).permute(0, 3, 1, 2)) for part in (drawings[:30], drawings[-30:])]
    np.testing.assert_allclose(got.pooled[0], features[1].double().mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.pooled[1], np.cov(features[1].double().numpy(), rowvar=False), rtol=1e-3, atol=1e-5)
    assert (result["metrics"]["precision"], result["metrics"]["recall"]) == precision_recall(*features)


def test_the_batch_size_does_not_change_the_numbers(files: tuple[Path, Path]) -> None:
    one, many = (evaluate(*files, create_extractor("emoji"), batch_size=size)[0]["metrics"] for size in (1, 30))
    for name, value in one.items():
        assert value == pytest.approx(many[name], rel=1e-4)


def test_images_and_their_saved_statistics_give_the_same_distance(files: tuple[Path, Path], tmp_path: Path) -> None:
    ref, samples = files
    emoji(ref, "--save-statistics", tmp_path / "ref_statistics.npz")
    emoji(ref, samples, "--save-statistics", tmp_path / "statistics.npz", "--json", tmp_path / "images.json")
    emoji(tmp_path / "ref_statistics.npz", tmp_path / "statistics.npz", "--json", tmp_path / "statistics.json")
    images, statistics = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("images", "statistics"))
    assert statistics["metrics"]["fd_emoji"] == pytest.approx(images["metrics"]["fd_emoji"], rel=1e-9)
    assert statistics["metrics"]["precision"] is None and "more than 3 images" in statistics["notes"][-1]
    emoji(ref, ref, "--json", tmp_path / "same.json")
    same = json.loads((tmp_path / "same.json").read_text())["metrics"]
    assert abs(same["fd_emoji"]) < 1e-4 and same["precision"] == same["recall"] == 1


def test_stored_statistics_are_used_and_the_images_beside_them_serve_precision_and_recall(files: tuple[Path, Path], tmp_path: Path) -> None:
    with np.load(files[0]) as archive:
        np.savez(tmp_path / "both.npz", arr_0=archive["arr_0"], mu=np.full(3, 7.0), sigma=np.eye(3), mu_s=np.zeros(1), sigma_s=np.eye(1))
    result, _ = evaluate(tmp_path / "both.npz", files[1], Histogram(), max_images=12)
    assert measure(Batch(tmp_path / "both.npz"), Histogram(), 8).pooled[0].tolist() == [7, 7, 7]
    assert result["settings"]["reference_statistics"] == "stored" and result["settings"]["precision_recall_images"] == [12, 12]
    assert all(value is not None for value in result["metrics"].values()) and len(result["metrics"]) == 5
    # Those of another network are left aside.
    assert evaluate(tmp_path / "both.npz", files[1], create_extractor("emoji"))[0]["settings"]["reference_statistics"] == "computed"


def test_a_folder_of_pictures_is_the_reference_that_an_npz_of_them_is(files: tuple[Path, Path], drawings: np.ndarray, tmp_path: Path) -> None:
    for k, image in enumerate(drawings[:30]):
        path = tmp_path / "folder" / f"class{k // 10}" / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    emoji(*files, "--json", tmp_path / "npz.json")
    emoji(tmp_path / "folder", files[1], "--json", tmp_path / "folder.json")
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("npz", "folder")]
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], rel=1e-5)
    assert results[0]["settings"]["reference"] != results[1]["settings"]["reference"]
    Image.fromarray(drawings[0]).resize((130, 100)).save(path)  # pictures of other sizes are cropped to the samples', and are another reference
    changed, _ = evaluate(tmp_path / "folder", files[1], create_extractor("emoji"))
    assert changed["metrics"] != results[1]["metrics"] and changed["settings"]["reference"] != results[1]["settings"]["reference"]
    emoji(tmp_path / "folder", "--save-statistics", tmp_path / "folder.npz")
    assert evaluate(tmp_path / "folder.npz", files[1], create_extractor("emoji"))[0]["metrics"]["fd_emoji"] == pytest.approx(changed["metrics"]["fd_emoji"])
    (tmp_path / "empty").mkdir()
    for folder, says in (("empty", "no class folders"), ("folder/class0", "no class folders")):
        with pytest.raises(InputError, match=says):
            emoji(tmp_path / folder, files[1])
    with pytest.raises(InputError, match="size for the pictures"):
        load_reference_statistics(Histogram(), tmp_path / "folder")


def test_shipped_references_go_by_name(files: tuple[Path, Path], tmp_path: Path) -> None:
    emoji("held_out", files[1], "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["metrics"]["fd_emoji"] > 0 and result["settings"]["reference"].startswith("held_out")
    mean, _ = load_reference_statistics(create_extractor("emoji"), files[0])
    assert mean.shape == (128,)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_the_reader_gives_every_image_once_and_its_memory_does_not_grow_with_their_number(tmp_path: Path, save: Callable[..., None]) -> None:
    peaks = []
    for count in (50, 500):
        images = np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        save(tmp_path / "a.npz", images)
        seen = torch.cat(list(Batch(tmp_path / "a.npz").images(16)))
        assert np.array_equal(seen.permute(0, 2, 3, 1).numpy(), images)
        assert torch.equal(torch.cat(list(Batch(tmp_path / "a.npz").images(16, limit=20))), seen[:20])
        del images, seen
        tracemalloc.start()
        measure(Batch(tmp_path / "a.npz"), Histogram(), 16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 50_000, peaks
    assert peaks[1] < 500 * 32 * 32 * 3 / 2


def truncated(path: Path, images: np.ndarray) -> None:
    np.savez(path, images)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path, images: np.ndarray) -> None:
    np.savez(path, images)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def cut_array(path: Path, images: np.ndarray) -> None:
    np.save(path.with_suffix(".npy"), images)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", path.with_suffix(".npy").read_bytes()[:-100])


BAD_FILES = {
    "truncated": (truncated, "truncated or no .npz file"),
    "cut array": (cut_array, "truncated"),
    "damaged": (flipped, "damaged"),
    "text": (lambda path, images: path.write_text("no"), "no .npz file"),
    "missing": (lambda path, images: None, "no file"),
    "floats": (lambda path, images: np.savez(path, images / 255), "float64"),
    "objects": (lambda path, images: np.savez(path, np.array([{}, []], dtype=object)), "object"),
    "channels first": (lambda path, images: np.savez(path, images.transpose(0, 3, 1, 2)), "[30, 3, 64, 64]"),
    "one image": (lambda path, images: np.savez(path, images[:1]), "at least 2"),
    "no image": (lambda path, images: np.savez(path, images[:0]), "[0, 64, 64, 3]"),
    "other size": (lambda path, images: np.savez(path, images[:, ::2, ::2]), "knows 64x64 images"),
    "other keys": (lambda path, images: np.savez(path, images=images), "neither images (arr_0) nor statistics"),
    "half the statistics": (lambda path, images: np.savez(path, mu=np.zeros(128)), "mu without sigma"),
    "other features": (lambda path, images: np.savez(path, mu=np.zeros(5), sigma=np.eye(5)), "statistics of 5 features"),
    "shapes": (lambda path, images: np.savez(path, mu=np.zeros(5), sigma=np.eye(4)), "no mean and covariance"),
    "pickled statistics": (lambda path, images: np.savez(path, mu=np.array([{}]), sigma=np.eye(1)), "cannot be read"),
}


@pytest.mark.parametrize("side", ["reference", "samples"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_gets_one_sentence_exit_code_2_and_no_result(
    files: tuple[Path, Path], drawings: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture, case: str, side: str
) -> None:
    make, says = BAD_FILES[case]
    make(tmp_path / "bad.npz", drawings[:30])
    pair = (tmp_path / "bad.npz", files[1]) if side == "reference" else (files[0], tmp_path / "bad.npz")
    with pytest.raises(SystemExit) as stopped:
        run(lambda: emoji(*pair, "--json", tmp_path / "result.json"))
    error = capsys.readouterr().err.strip().splitlines()[-1]  # a progress bar may stand before it
    assert stopped.value.code == 2 and error.startswith("error: ") and says in error
    assert not (tmp_path / "result.json").exists()


BAD_ARGUMENTS = {
    "no samples": (["ref.npz"], "pass SAMPLES.npz too"),
    "nothing": ([], "pass REF.npz and SAMPLES.npz"),
    "samples in a folder": (["ref.npz", "."], "could not read . (Is a directory)"),
    "graph alone": (["ref.npz", "samples.npz", "--graph", "g.pb"], "belongs to --backend tensorflow"),
    "no graph": (["ref.npz", "samples.npz", "--backend", "tensorflow"], "pass --graph FILE"),
    "missing graph": (["ref.npz", "samples.npz", "--backend", "tensorflow", "--graph", "nowhere.pb"], "no file nowhere.pb"),
    "tensorflow emoji": (["ref.npz", "samples.npz", "--backend", "tensorflow", "--extractor", "emoji"], "Inception alone"),
    "statistics": (["ref.npz", "--save-statistics", "a.txt"], "writes an .npz file"),
    "folder for a result": (["ref.npz", "samples.npz", "--json", "."], "is a folder; name a file"),
    "missing result": (["--compare", "nowhere.json"], "no file nowhere.json"),
    "folder of results": (["--compare", "."], "could not read . (Is a directory)"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_get_one_sentence(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, case: str) -> None:
    arguments, says = BAD_ARGUMENTS[case]
    monkeypatch.chdir(files[0].parent)
    with pytest.raises(SystemExit) as stopped:
        run(lambda: evaluator.main([*arguments, "--device", "cpu"]))
    assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_a_backend_that_is_not_installed_is_named(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graph.pb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setitem(sys.modules, "tensorflow.compat.v1", None)
    with pytest.raises(InputError, match="pip install tensorflow"):
        evaluator.main(["ref.npz", "samples.npz", "--backend", "tensorflow", "--graph", str(tmp_path / "graph.pb"), "--device", "cpu"])
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match="pip install -r requirements.txt; --extractor emoji needs none"):
        evaluator.main(["ref.npz", "samples.npz", "--device", "cpu"])


def test_results_with_other_settings_do_not_share_a_table_in_silence(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ref, samples = files
    emoji(ref, samples, "--json", tmp_path / "a.json")
    other = {**SETTINGS["settings"], "num_steps": 50, "cfg_scale": 1.5}
    (tmp_path / "samples.json").write_text(json.dumps({"settings": other, "weights": {"vae": "ab"}}))
    emoji(ref, samples, "--json", tmp_path / "b.json")
    (tmp_path / "samples.json").unlink()
    emoji(ref, samples, "--json", tmp_path / "c.json")
    capsys.readouterr()
    program.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")])
    assert "omparable" not in capsys.readouterr().out
    program.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "Not comparable: these rows differ in num_steps (20 / 50), cfg_scale (2.0 / 1.5)." in capsys.readouterr().out
    program.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "c.json")])
    assert "Perhaps not comparable: solver, num_steps, spacing, cfg_scale, cfg_channels, vae unknown for at least one row." in capsys.readouterr().out


def test_a_plain_table_of_settings_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"solver": "DDPM", "vae": "x"}))
    assert sample_settings(tmp_path / "s.npz") == {"solver": "DDPM", "vae": "x"}
    assert sample_settings(tmp_path / "other.npz") == {"vae": "unknown"}
    rows = [{"name": name, "metrics": {"fid": 2.0}, "settings": {"vae": vae}} for name, vae in (("a", "x"), ("b", "y"))]
    rows.append({"name": "c", "metrics": {"fid": None}, "settings": {}})
    table = comparison_table(rows)
    assert "vae (x / y / unknown)" in table and "Perhaps" in table


def test_the_self_test_says_what_to_fetch(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    evaluator.main(["--self-test", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")])
    printed = capsys.readouterr().out
    assert printed.startswith("skipped: ") and "openai/guided-diffusion" in printed


@pytest.mark.parametrize("worse", [0.0, 0.1])
def test_the_self_test_holds_the_numbers_to_the_published_ones(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, worse: float
) -> None:
    metrics = {name: value * 1.001 for name, value in program.PUBLISHED.items()} | {"sfid": 6.14 + worse}
    monkeypatch.setattr(program, "load_extractor", lambda args: None)
    monkeypatch.setattr(program, "evaluate", lambda *arguments, **options: ({"metrics": metrics}, None))
    if worse:
        with pytest.raises(InputError, match="^sfid lie more than 1%"):
            evaluator.main(["--self-test", *map(str, files)])
    else:
        evaluator.main(["--self-test", *map(str, files)])
    assert "| inception_score |" in capsys.readouterr().out


def test_the_script_and_the_module_are_one_program() -> None:
    helps = [
        subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.partition("Measure")[2]
        for command in (["dit/evaluator.py"], ["-m", "tstitch.metrics"])
    ]
    assert helps[0] == helps[1] and "--extractor" in helps[0]


def test_the_core_imports_neither_torchvision_nor_torch_fidelity() -> None:
    code = "import sys, dit.evaluator, tstitch.autoencoder, tstitch.metrics.extractors as e; e.create_extractor('emoji')\n"
    code += "assert not {'torchvision', 'torch_fidelity', 'tensorflow'} & sys.modules.keys(), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_torchvision_and_what_imports_it_can_be_imported_whatever_its_build() -> None:
    code = "from tstitch.torchvision_compat import prepare_torchvision as p; p(); p(); import torchvision.transforms; from diffusers import AutoencoderKL"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def inception_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's network, as a file."""
    from tstitch.metrics.inception import WEIGHTS
    from tstitch.torchvision_compat import prepare_torchvision

    prepare_torchvision()
    FeatureExtractorInceptionV3 = pytest.importorskip("torch_fidelity").FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *arguments, **options: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *arguments, **options: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    folder = tmp_path_factory.mktemp("inception")
    torch.save(network.state_dict(), folder / WEIGHTS)
    return folder


def test_inception_gives_pool_spatial_and_probabilities_of_the_layers_that_adm_names(inception_folder: Path) -> None:
    extractor = create_extractor("inception", folder=inception_folder)
    images = torch.randint(256, (3, 3, 48, 40), dtype=torch.uint8)
    blocks = {}
    for name in ("Mixed_6d", "Mixed_6e"):
        getattr(extractor.network, name).register_forward_hook(lambda module, given, out, name=name: blocks.__setitem__(name, out))
    got = extractor.measure(images)
    assert got.pool.shape == (3, extractor.dim) and got.spatial.shape == (3, extractor.spatial_dim) and got.probs.shape == (3, 1008)
    # mixed_6, the third of the 17x17 blocks mixed_4 ... mixed_7: the 1x1 branch after its relu stands first in the block's output.
    assert blocks["Mixed_6d"].shape == (3, 768, 17, 17)
    assert torch.equal(got.spatial, blocks["Mixed_6d"][:, :7].permute(0, 2, 3, 1).reshape(3, -1))  # channels last, as TensorFlow stores them
    assert got.spatial.min() >= 0 and got.spatial.std() > 0
    assert not torch.equal(got.spatial, blocks["Mixed_6e"][:, :7].permute(0, 2, 3, 1).reshape(3, -1))
    torch.testing.assert_close(got.probs, (got.pool @ extractor.network.fc.weight.T).softmax(dim=1))  # no bias
    torch.testing.assert_close(extractor(images[1:2]), got.pool[1:2], rtol=1e-4, atol=1e-6)


def test_the_whole_suite_runs_on_inception(
    inception_folder: Path, drawings: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(program, "create_extractor", lambda name, device: create_extractor(name, device, inception_folder))
    np.savez(tmp_path / "ref.npz", drawings[:6])
    np.savez(tmp_path / "samples.npz", drawings[6:12])
    evaluator.main([str(tmp_path / "ref.npz"), str(tmp_path / "samples.npz"), "--device", "cpu", "--batch-size", "4", "--json", str(tmp_path / "r.json")])
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert list(metrics) == ["fid", "sfid", "inception_score", "precision", "recall"]
    assert metrics["fid"] > 0 and metrics["sfid"] > 0 and metrics["inception_score"] >= 1


def test_weights_that_are_missing_damaged_or_of_another_network_are_refused(inception_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tstitch.metrics.inception import WEIGHTS

    def no_network(*arguments: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(InputError, match=f"put {WEIGHTS} into .* --extractor emoji, which needs none"):
        create_extractor("inception", folder=tmp_path)
    (tmp_path / WEIGHTS).write_bytes((inception_folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(InputError, match="truncated"):
        create_extractor("inception", folder=tmp_path)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="does not fit the Inception network"):
        create_extractor("inception", folder=tmp_path)
