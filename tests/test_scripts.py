"""The scripts as a user runs them, on the bundled emoji models: what they write, and what they answer to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from dit import sample as sample_script
from dit import sample_t_stitch, sweep_emoji
from dit.checkpoints import build_dit
from ldm.scripts import sweep_emoji as ldm_sweep_emoji
from sit import sweep_emoji as sit_sweep_emoji
from tstitch import emoji_sweep
from tstitch.checkpoints import file_hash, save_weights
from tstitch.cli import run, sampling_plan
from tstitch.errors import InputError
from tstitch.presets import ROOT, get_preset
from tstitch.results import quality_by_schedule
from tstitch.schedule import StitchSchedule, two_way_ratios

QUICK = ["--preset", "emoji", "--num-sampling-steps", "2", "--class-labels", "0", "8", "--device", "cpu"]


def test_all_tradeoffs_writes_a_grid_and_a_table_of_eleven_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sample_t_stitch.main([*QUICK, "--all_tradeoffs", "--save_dir", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [StitchSchedule.from_json(row["schedule"]).fractions[0] for row in results["rows"]] == [k / 10 for k in range(11)]
    assert [row["evaluations"] for row in results["rows"]] == [[int(k / 5), 2 - int(k / 5)] for k in range(11)]
    assert results["rows"][0]["speed_up"] == 1 and results["rows"][-1]["speed_up"] > 1
    assert results["settings"]["num_steps"] == 2 and results["seeds"] == [0, 1]
    assert all(row["fd_emoji"] is None for row in results["rows"])  # measured at other settings, so not shown beside these
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.std() > 20
    assert "| ratio 0.9 |" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


def test_the_same_seed_gives_the_same_picture_alone_and_in_company(tmp_path: Path) -> None:
    def cells(name: str, *arguments: str) -> np.ndarray:
        sample_script.main(["--preset", "emoji", "--num-sampling-steps", "3", "--device", "cpu", "--save_dir", str(tmp_path / name), *arguments])
        return np.asarray(Image.open(tmp_path / name / "sample.png").convert("RGB"))

    company = cells("company", "--class-labels", "0", "8", "--seed", "3")
    alone = cells("alone", "--class-labels", "8", "--seed", "4")
    width = alone.shape[1] - 8 - 4
    difference = company[-width - 4 : -4, -width - 4 : -4].astype(int) - alone[-width - 4 : -4, -width - 4 : -4]
    assert np.abs(difference).max() <= 1  # the last bit of float32 may turn one grey level


def test_three_models_share_a_trajectory(tmp_path: Path) -> None:
    sample_t_stitch.main(
        ["--preset", "emoji", "--num-sampling-steps", "5", "--three_combo", "0.4", "0.2", "0.4", "--device", "cpu", "--save_dir", str(tmp_path)]
    )
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["name"], row["evaluations"]) == ("S:40 B:20 L:40", [2, 1, 2])
    assert Image.open(tmp_path / "grid.png").size[0] > 200


def truncated(tmp_path: Path) -> str:
    path = tmp_path / "cut.safetensors"
    path.write_bytes((ROOT / "pretrained_models/emoji/dit-small.safetensors").read_bytes()[:100_000])
    return str(path)


BAD_INPUT = {
    "ratio": (["--ratio", "1.2"], "ratio must lie in [0, 1]"),
    "fractions": (["--three_combo", "0.4", "0.4", "0.4"], "sum to 1.2, expected 1"),
    "preset": (["--preset", "emojis"], "choose from emoji, imagenet256"),
    "labels": (["--class-labels", "9"], "choose from 0..8"),
    "no steps": (["--num-sampling-steps", "0"], "must lie in 1..1000"),
    "too many steps": (["--num-sampling-steps", "1001"], "must lie in 1..1000"),
    "image size": (["--image-size", "63"], "not divisible by 4"),
    "other image size": (["--image-size", "128"], "was trained for 64x64"),
    "classes": (["--num-classes", "10"], "was trained for 9 classes"),
    "solver": (["--solver", "dimm"], "choose from ddpm, ddim, dpm++"),
    "missing checkpoint": (["--s_ckpt", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    "truncated checkpoint": (["--s_ckpt", truncated], "truncated"),
    "not a checkpoint": (["--xl_ckpt", str(ROOT / "Makefile")], "was not loaded"),
    "another size": (["--s_ckpt", str(ROOT / "pretrained_models/emoji/dit-large.safetensors")], "another size"),
    "another kind of model": (["--s_ckpt", str(ROOT / "pretrained_models/emoji/features.safetensors")], "is not a DiT"),
    "guidance": (["--cfg-scale", "nan"], "finite"),
    "no weights": (["--preset", "imagenet256"], "pretrained_models/readme.txt"),
    "autoencoder": (["--vae", "pretrained_models/nowhere"], "--vae"),
    "device": (["--device", "cuda:99"], "not available"),
    "number of images": (["--num-images", "0"], "at least 1"),
    "seed": (["--seed", "-1"], "must not be negative"),
    "guidance channels": (["--cfg-channels", "some"], "number or 'all'"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence_exit_code_2_and_no_file(tmp_path: Path, capsys: pytest.CaptureFixture, case: str) -> None:
    arguments, says = BAD_INPUT[case]
    arguments = [a(tmp_path) if callable(a) else a for a in arguments]
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        run(lambda: sample_t_stitch.main([*QUICK, "--save_dir", str(out), *arguments]))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert error.startswith("error: ") and "\n" not in error and says in error
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_refused_before_sampling(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as stopped:
        run(lambda: sample_t_stitch.main([*QUICK, "--save_dir", str(tmp_path / "file" / "out")]))
    assert stopped.value.code == 2 and "is a file; choose another folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"
    with pytest.raises(SystemExit) as stopped:
        run(lambda: sample_t_stitch.main([*QUICK, "--save_dir", str(tmp_path / ("x" * 300))]))
    assert stopped.value.code == 2 and "File name too long" in capsys.readouterr().err


def test_a_device_without_memory_is_one_sentence_with_the_flags_that_need_less(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    with pytest.raises(SystemExit) as stopped:
        run(main)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and error.startswith("error: out of memory on the device; pass a smaller --max-batch") and "\n" not in error


def test_a_checkpoint_for_other_pictures_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = build_dit("emoji-small", input_size=8, num_classes=9)
    save_weights(tmp_path / "tiny.safetensors", model.state_dict(), model.config)
    with pytest.raises(SystemExit) as stopped:
        run(lambda: sample_t_stitch.main([*QUICK, "--save_dir", str(tmp_path / "out"), "--s_ckpt", str(tmp_path / "tiny.safetensors")]))
    assert stopped.value.code == 2 and "trained for 32x32 pictures" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--rato", "--all_tradeoff", "--steps"])
def test_unknown_and_abbreviated_flags_are_errors(flag: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        sample_t_stitch.main([flag])
    assert stopped.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_a_misspelt_flag_is_one_sentence_with_the_flag_that_was_meant(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        sample_t_stitch.main(["--ratoi", "0.4", "--num_image=3", "--nothing-like-it"])
    message = "unrecognized arguments: --ratoi 0.4 --num_image=3 --nothing-like-it; did you mean --ratio, --num-images? --help lists what there is"
    assert capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(SystemExit):
        sample_t_stitch.main(["--num-images", "many"])
    assert capsys.readouterr().err == "error: argument --num-images: invalid int value: 'many'; --help lists what there is\n"


@pytest.mark.parametrize("folder", [ROOT, ROOT / "dit"], ids=["repository", "dit"])
def test_scripts_run_from_the_root_and_from_their_folder(folder: Path) -> None:
    script = (ROOT / "dit" / "sample_t_stitch.py").relative_to(folder)
    done = subprocess.run([sys.executable, str(script), "--help"], cwd=folder, capture_output=True, text=True, check=True)
    assert "--three_combo SMALL BASE LARGE" in done.stdout


def test_the_dataset_recipe_composes_on_white_and_holds_out_whole_emoji(tmp_path: Path) -> None:
    import io
    import tarfile

    from assets.emoji import build_dataset
    from assets.emoji.emoji_data import load_drawings

    def package(name: str) -> Path:
        buffer = io.BytesIO()
        picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        picture.paste((255, 0, 0, 255), (0, 0, 32, 64))
        picture.save(buffer, "PNG")
        emoji = [
            {"name": f"E{k}", "short_name": f"e{k}", "unified": f"{k:X}", "image": f"{k:x}.png", "category": category,
             "skin_variations": {"1F3FB": {"image": f"{k:x}-tone.png"}}}
            for k, category in enumerate(["Objects", "Flags", "Component"] * 12)
        ]  # fmt: skip
        files = {"package/emoji.json": json.dumps(emoji).encode()}
        files |= {f"package/img/{name}/64/{e}": buffer.getvalue() for k in range(36) for e in (f"{k:x}.png", f"{k:x}-tone.png")}
        with tarfile.open(tmp_path / f"{name}.tgz", "w:gz") as archive:
            for path, content in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return tmp_path / f"{name}.tgz"

    tarballs = [f"{name}={package(name)}" for name in ("google", "twitter")]
    build_dataset.main(["--out", str(tmp_path / "emoji.npz"), "--tarballs", *tarballs])
    train, held_out = load_drawings(tmp_path / "emoji.npz", held_out=False), load_drawings(tmp_path / "emoji.npz", held_out=True)
    assert len(train.labels) + len(held_out.labels) == 24 * 2 * 2
    assert 0 < len(held_out.labels) < 24 and not set(train.names) & set(held_out.names)
    assert set(train.labels.tolist()) == {6, 8}
    assert train.images[0, :, 0, 0].tolist() == [255, 0, 0] and train.images[0, :, 0, 63].tolist() == [255, 255, 255]


def test_quality_is_shown_beside_its_own_settings_and_weights_alone(tmp_path: Path) -> None:
    table = {"settings": {"num_steps": 20, "solver": "DDIM"}, "weights": {"S": "aa", "L": "bb"}, "rows": [{"name": "S:30 L:70", "fd_emoji": 1.5}]}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(table))
    assert quality_by_schedule([path], {"num_steps": 20}, {"S": "aa", "L": "bb"})[1] == {"S:30 L:70": 1.5}
    assert quality_by_schedule([path], {"num_steps": 10}, {"S": "aa", "L": "bb"})[1] == {}
    assert quality_by_schedule([path], {"num_steps": 20}, {"S": "aa", "L": "other"})[1] == {}
    assert quality_by_schedule([], {}, {})[1] == {}
    assert quality_by_schedule([tmp_path / "missing.json", path], {"num_steps": 20}, {"S": "aa", "L": "bb"})[1] == {"S:30 L:70": 1.5}


def test_the_shipped_results_belong_to_the_shipped_weights_and_the_demo_s_settings() -> None:
    preset = get_preset("emoji")
    args = sample_t_stitch.parse_args(["--preset", "emoji", "--all_tradeoffs"])
    weights = {file.letter: file_hash(file.path) for file in preset.denoisers} | {"vae": file_hash(Path(preset.vae) / "diffusion_pytorch_model.safetensors")}
    _, quality = quality_by_schedule(preset.results, sampling_plan(args).settings, weights)
    assert {schedule.describe(["S", "L"]) for schedule in two_way_ratios()} <= quality.keys()
    assert all(value > 0 for value in quality.values())


def test_a_sweep_that_was_cut_off_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sweep(name: str) -> list[dict]:
        out = tmp_path / name / "out.json"
        sweep_emoji.main([
            "--num-images", "6", "--chunk", "2", "--num-sampling-steps", "2", "--device", "cpu", "--out", str(out), "--work-dir", str(tmp_path / name / "work"),
        ])  # fmt: skip
        assert Image.open(out.with_suffix(".png")).size[0] > 300
        return [{key: row[key] for key in ("name", "fd_emoji", "fd_emoji_held_out")} for row in json.loads(out.read_text())["rows"]]

    whole = sweep("whole")
    store, calls = emoji_sweep.store, []

    def dies_after_the_second_chunk(*arguments) -> None:
        store(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(emoji_sweep, "store", dies_after_the_second_chunk)
    with pytest.raises(KeyboardInterrupt):
        sweep("cut")
    assert sweep("cut") == whole
    assert len(calls) == 3
    assert len(whole) == len(sweep_emoji.RATIOS) + len(sweep_emoji.THREE_MODEL_MIXES) == 17


def test_a_sweep_takes_any_schedules_and_refuses_what_is_none(tmp_path: Path) -> None:
    few = ["--num-images", "2", "--num-sampling-steps", "5", "--device", "cpu", "--out", str(tmp_path / "out.json"), "--work-dir", str(tmp_path / "work")]
    large_first = '{"fractions": [0.6, 0.4], "order": [2, 0]}'
    sweep_emoji.main([*few, "--ratios", "0", "0.4", "--no-mixes", "--schedules", large_first, '{"fractions": [0.4, 0.6], "order": [0, 1]}'])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["L:100", "S:40 L:60", "L:60 S:40", "S:40 B:60"]
    assert [row["evaluations"] for row in rows] == [[0, 0, 5], [2, 0, 3], [2, 0, 3], [2, 3, 0]]
    for wrong, reason in (("{", "not a stitch schedule"), ('{"fractions": [0.5, 0.5], "order": [0, 3]}', "denoiser")):
        with pytest.raises(InputError, match=reason):
            sweep_emoji.main([*few, "--schedules", wrong])


@pytest.mark.parametrize("script", [sweep_emoji, sit_sweep_emoji, ldm_sweep_emoji], ids=["dit", "sit", "ldm"])
def test_a_sweep_refuses_results_that_its_picture_would_overwrite_or_that_are_a_folder(script: ModuleType, tmp_path: Path, monkeypatch) -> None:
    first = ["ODE"] if script is sit_sweep_emoji else []
    few = [*first, "--num-images", "2", "--device", "cpu", "--work-dir", str(tmp_path / "work"), "--out"]
    monkeypatch.setattr(emoji_sweep, "Autoencoder", lambda *how: pytest.fail("began to work"))
    for name in ("x.png", "dit_0.5", "results"):
        with pytest.raises(InputError, match=rf"{name} must end in \.json"):
            script.main([*few, str(tmp_path / name)])
    for name in ("a.json", "b.png"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"a\.json is a folder; name a file"):
        script.main([*few, str(tmp_path / "a.json")])
    with pytest.raises(InputError, match=r"b\.png is a folder; name a file"):
        script.main([*few, str(tmp_path / "b.json")])
    assert not (tmp_path / "work").exists()
