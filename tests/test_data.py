"""Training data: extraction gives the same bytes from any number of processes and after a kill; damaged pictures are named and never drawn."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image

from benchmarks import feature_loading
from dit import extract_features, train
from tstitch.autoencoder import PIXELS, Autoencoder, AutoencoderFile, weights_file
from tstitch.cli import run
from tstitch.data import FeatureStore, FeatureWriter, FileFeatures, ImageLatents, draw_latents, open_features, write_features
from tstitch.errors import InputError
from tstitch.noise import SampleNoise
from tstitch.pictures import DamagedPictureError, ImageFolder, center_crop

SIZE = 16


def noisy_picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_pictures(folder: Path, count: int) -> Path:
    for k in range(count):
        path = folder / ("cat", "dog")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noisy_picture(16 + 5 * k % 23, 16 + 7 * k % 31, seed=k).save(path)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder of random weights: 16x16 pixels to 4x8x8 latents."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16), norm_num_groups=4,
        latent_channels=4, sample_size=SIZE, scaling_factor=0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen small pictures of two classes."""
    return save_pictures(tmp_path_factory.mktemp("pictures"), 13)


def arguments(pictures: Path, vae: Path, out: Path, *more: str) -> list[str]:
    return [
        "--data-path", str(pictures), "--vae", str(vae), "--features-path", str(out), "--image-size", str(SIZE), "--batch-size", "2", "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def store(pictures: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures' features, extracted by one process."""
    folder = tmp_path_factory.mktemp("store")
    extract_features.main(arguments(pictures, vae, folder))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def launch(arguments: list[str], rank: int, world_size: int, port: int) -> subprocess.Popen:
    """Start one process of extract_features.py as a launcher would."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | {key: str(value) for key, value in group.items()}
    return subprocess.Popen([sys.executable, extract_features.__file__, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("layout", "world_size"), [("store", 3), ("files", 1)])
def test_a_run_killed_in_the_middle_is_resumed_by_another_number_of_processes_to_the_same_bytes(
    vae: Path, tmp_path: Path, layout: str, world_size: int
) -> None:
    many = save_pictures(tmp_path / "pictures", 120)
    extract_features.main(arguments(many, vae, tmp_path / "whole", "--layout", layout))
    port = free_port()
    processes = [launch(arguments(many, vae, tmp_path / "killed", "--layout", layout), rank, world_size, port) for rank in range(world_size)]
    status = tmp_path / "killed" / "status.bin"
    try:
        deadline = time.monotonic() + 180
        while not (status.exists() and sum(status.read_bytes()) >= 6):
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.002)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
    assert 6 <= sum(status.read_bytes()) < 120
    with pytest.raises(InputError, match="unfinished"):
        open_features(tmp_path / "killed")
    extract_features.main(arguments(many, vae, tmp_path / "killed", "--layout", layout))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_three_processes_write_the_bytes_that_one_writes(pictures: Path, vae: Path, store: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([*torchrun, extract_features.__file__, *arguments(pictures, vae, tmp_path)], env=environment, check=True, timeout=300)
    assert contents(tmp_path) == contents(store)


def test_a_finished_extraction_run_again_changes_nothing(pictures: Path, vae: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(store)
    monkeypatch.setattr(Autoencoder, "encode", None)  # nothing is left to encode
    extract_features.main(arguments(pictures, vae, store))
    assert contents(store) == before


def test_a_store_keeps_the_moments_of_each_picture_and_of_its_mirror_image(pictures: Path, vae: Path, store: Path) -> None:
    folder, autoencoder, features = ImageFolder(pictures, SIZE), Autoencoder(vae), FeatureStore(store)
    for mirror in (0, 1):
        expected = autoencoder.encode(torch.stack([folder.image(k, mirror=bool(mirror)) for k in range(13)]))
        torch.testing.assert_close(torch.from_numpy(features.moments[:, mirror].astype(np.float32)), expected, atol=2e-3, rtol=1e-3)
    assert np.abs(features.moments[:, 0, ..., ::-1] - features.moments[:, 1]).max() > 0.05  # mirrored moments would not do
    assert features.labels.tolist() == [0] * 7 + [1] * 6 and features.index["class_names"] == ["cat", "dog"]
    assert features.index["scaling_factor"] == 0.5 and features.latent_shape == (4, 8, 8) and features.num_classes == 2


def test_every_epoch_draws_anew_from_a_store(store: Path) -> None:
    features, index = FeatureStore(store), torch.arange(13)
    torch.manual_seed(0)
    first, second = features.latents(index), features.latents(index)
    torch.manual_seed(0)
    assert torch.equal(features.latents(index), first) and not torch.equal(first, second)


def test_pictures_encoded_while_training_give_what_the_store_gives(pictures: Path, vae: Path, store: Path) -> None:
    features, live = FeatureStore(store), ImageLatents(ImageFolder(pictures, SIZE), vae)
    index, drawn = torch.tensor([3, 0, 12, 5, 5]), []
    for source in (features, live):
        torch.manual_seed(1)
        drawn.append(source.latents(index))
    torch.testing.assert_close(drawn[0], drawn[1], atol=5e-3, rtol=5e-3)
    assert torch.equal(features.labels, live.labels) and len(live) == len(features) and live.latent_shape == features.latent_shape


def test_an_autoencoder_of_the_hub_is_known_by_its_file_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    file = repository / "snapshots" / "abc" / "diffusion_pytorch_model.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert weights_file("owner/name") == file
    assert not weights_file("owner/other").exists()


def test_without_autoencoder_latents_are_pictures_from_folder_store_and_frozen_files_alike(pictures: Path, tmp_path: Path) -> None:
    folder, autoencoder = ImageFolder(pictures, SIZE), Autoencoder(PIXELS)
    images = torch.stack([folder.image(k) for k in range(13)])
    sources = [ImageLatents(folder, PIXELS, flip=False)]
    for layout in ("store", "files"):
        extract_features.main(arguments(pictures, Path(PIXELS), tmp_path / layout, "--no-flip", "--layout", layout, "--dtype", "bf16"))
        sources.append(open_features(tmp_path / layout))
    for source in sources:
        latents = source.latents(torch.arange(13))
        torch.testing.assert_close(latents, images / 127.5 - 1, atol=0.005, rtol=0)
        assert torch.equal(autoencoder.decode(latents), images)
        assert source.latent_shape == autoencoder.latent_shape(SIZE) == (3, SIZE, SIZE) and source.index["vae_hash"] == sources[0].index["vae_hash"]
    assert torch.equal(sources[0].latents(torch.arange(13)), sources[0].latents(torch.arange(13)))  # a posterior without variance
    with pytest.raises(InputError, match="3 latent channels, the denoisers 4"):
        autoencoder.check_fit((4, SIZE, SIZE), SIZE)


def test_a_pixel_decodes_to_the_level_whose_cell_it_lies_in() -> None:
    levels = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for within in (0.001, 0.5, 0.999):
        assert torch.equal(Autoencoder(PIXELS).decode(2 * (levels + within) / 256 - 1), levels.byte())
    beyond = torch.tensor([-3.0, 3.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert Autoencoder(PIXELS).decode(beyond).unique().tolist() == [0, 255]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_refused_and_not_decoded_to_black(vae: Path, value: float) -> None:
    latents = torch.zeros(5, 4, 2, 2)
    latents[3, 1, 1, 0] = value
    autoencoder = Autoencoder(vae)
    with pytest.raises(InputError, match="the samples are not finite"):
        autoencoder.decode(latents, batch=2)
    assert len(autoencoder.decode(latents[:3], batch=2)) == 3


def test_latents_that_are_not_finite_are_refused_by_an_autoencoder_that_quantises_them_to_pictures() -> None:
    torch.manual_seed(0)
    vq = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=3, num_vq_embeddings=5)
    autoencoder = Autoencoder(AutoencoderFile(Path("vq.ckpt"), lambda: vq))
    latents = torch.zeros(1, 3, 8, 8)
    assert autoencoder.decode(latents).shape == (1, 3, 8, 8)
    latents[0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match="the samples are not finite"):
        autoencoder.decode(latents)


def test_latents_that_overflow_half_precision_are_refused(vae: Path) -> None:
    latents = torch.full((1, 4, 2, 2), 1e5)
    assert len(Autoencoder(vae).decode(latents)) == 1
    with pytest.raises(InputError, match="--dtype fp32 or bf16"):
        Autoencoder(vae, dtype=torch.float16).decode(latents)


def test_without_flip_there_is_one_image_of_each_picture(pictures: Path, vae: Path, store: Path, tmp_path: Path) -> None:
    extract_features.main(arguments(pictures, vae, tmp_path, "--no-flip"))
    assert np.array_equal(FeatureStore(tmp_path).moments[:, 0], FeatureStore(store).moments[:, 0]) and FeatureStore(tmp_path).moments.shape[1] == 1


def test_the_layout_of_fast_dit_holds_one_draw_of_what_the_store_holds(pictures: Path, vae: Path, store: Path, tmp_path: Path) -> None:
    extract_features.main(arguments(pictures, vae, tmp_path, "--layout", "files"))
    files, features = open_features(tmp_path), open_features(store)
    assert isinstance(files, FileFeatures) and torch.equal(files.labels, features.labels) and files.latent_shape == features.latent_shape
    feature, label = (np.load(tmp_path / f"imagenet256_{kind}" / "11.npy") for kind in ("features", "labels"))
    assert feature.dtype == np.float32 and feature.shape == (1, 4, 8, 8) and label.dtype == np.int64 and label.tolist() == [1]

    items = torch.arange(13)
    mirror = SampleNoise(range(13)).labels(2)
    assert 0 < mirror.sum() < 13
    moments = torch.from_numpy(features.moments[items.numpy(), mirror.numpy()]).float()
    torch.testing.assert_close(files.latents(items), draw_latents(moments, SampleNoise(range(13)), 0.5), atol=5e-3, rtol=5e-3)
    assert torch.equal(files.latents(items), files.latents(items))


def test_files_written_by_others_pair_by_number_not_by_name(tmp_path: Path) -> None:
    for folder in ("imagenet256_features", "imagenet256_labels"):
        (tmp_path / folder).mkdir()
    for k in range(12):
        np.save(tmp_path / "imagenet256_features" / f"{k}.npy", np.full((1, 4, 8, 8), k, dtype=np.float32))
        np.save(tmp_path / "imagenet256_labels" / f"{k}.npy", np.array([k]))
    features = open_features(tmp_path)
    assert features.labels.tolist() == list(range(12)) == features.latents(torch.arange(12))[:, 0, 0, 0].tolist()
    assert (features.num_classes, features.index["count"], len(features)) == (12, 12, 12)
    (tmp_path / "imagenet256_features" / "5.npy").write_bytes(b"cut")
    with pytest.raises(InputError, match="5.npy is damaged"):
        features.latents(torch.tensor([5]))
    (tmp_path / "imagenet256_labels" / "7.npy").unlink()
    with pytest.raises(InputError, match="do not pair"):
        open_features(tmp_path)


@pytest.mark.parametrize("layout", ["store", "files"])
def test_both_layouts_train(pictures: Path, vae: Path, tmp_path: Path, layout: str) -> None:
    extract_features.main(arguments(pictures, vae, tmp_path / "features", "--layout", layout))
    train.main([
        "--features-path", str(tmp_path / "features"), "--model", "emoji-small", "--max-steps", "2", "--global-batch-size", "4",
        "--results-dir", str(tmp_path / "run"), "--log-every", "1",
    ])  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize("layout", ["store", "files"])
def test_a_damaged_picture_fails_the_run_after_all_others_and_is_never_drawn(
    pictures: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture, layout: str
) -> None:
    mended, whole = save_pictures(tmp_path / "pictures", 13), tmp_path / "whole"
    extract_features.main(arguments(mended, vae, whole, "--layout", layout))
    intact = (mended / "dog" / "3.png").read_bytes()
    (mended / "dog" / "3.png").write_bytes(intact[: len(intact) // 2])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(lambda: extract_features.main(arguments(mended, vae, tmp_path / "out", "--layout", layout)))
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "left out: dog/3.png cannot be decoded" in said and "1 of 13 pictures could not be decoded (dog/3.png)" in said.splitlines()[-1]
    with pytest.raises(InputError, match="unfinished"):
        open_features(tmp_path / "out")

    extract_features.main(arguments(mended, vae, tmp_path / "out", "--layout", layout, "--skip-bad"))
    assert "12 features" in (printed := capsys.readouterr().out) and "1 damaged" in printed
    item, features, all_features = ImageFolder(mended, SIZE).names.index("dog/3.png"), open_features(tmp_path / "out"), open_features(whole)
    assert features.index["damaged"] == [{"item": item, "file": "dog/3.png"}]
    assert len(features) == 12 and features.labels.tolist() == [0] * 7 + [1] * 5
    others = torch.tensor([k for k in range(13) if k != item])
    drawn = []
    for source, index in ((features, torch.arange(12)), (all_features, others)):
        torch.manual_seed(0)
        drawn.append(source.latents(index))
    torch.testing.assert_close(drawn[0], drawn[1], atol=5e-3, rtol=5e-3)  # the neighbour in its batch was encoded alone

    (mended / "dog" / "3.png").write_bytes(intact)
    neighbour = mended / ImageFolder(mended, SIZE).names[item - 1]
    assert (item - 1) // 2 == item // 2  # of one batch
    intact = neighbour.read_bytes()
    neighbour.write_bytes(b"")
    extract_features.main(arguments(mended, vae, tmp_path / "out", "--layout", layout, "--skip-bad"))
    assert [damaged["item"] for damaged in open_features(tmp_path / "out").index["damaged"]] == [item - 1]
    neighbour.write_bytes(intact)
    extract_features.main(arguments(mended, vae, tmp_path / "out", "--layout", layout))
    assert contents(tmp_path / "out") == contents(whole)


def test_pictures_that_are_all_damaged_are_refused_even_with_skip_bad(vae: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "1.png").write_text("no picture")
    with pytest.raises(InputError, match=r"2 of 2 pictures .*a/1.png, b/1.png"):
        extract_features.main(arguments(tmp_path / "pictures", vae, tmp_path / "out", "--skip-bad"))


@pytest.mark.parametrize(
    ("more", "says"),
    [(["--no-flip"], "mirrors=2"), (["--layout", "files"], "layout='store'"), (["--image-size", "18"], "image_size=16"), (["--dtype", "bf16"], "vae_dtype")],
)
def test_a_folder_begun_with_other_settings_is_refused_and_left_alone(pictures: Path, vae: Path, store: Path, more: list[str], says: str) -> None:
    before = contents(store)
    with pytest.raises(InputError, match=says):
        extract_features.main(arguments(pictures, vae, store, *more))
    assert contents(store) == before


def test_arguments_that_cannot_be_used_are_refused_before_any_file_is_written(pictures: Path, vae: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "empty" / "class").mkdir(parents=True)
    for data, more, says in (
        (tmp_path / "nowhere", [], "no folder"),
        (tmp_path / "flat", [], "no class folders"),
        (tmp_path / "empty", [], "holds no pictures"),
        (pictures, ["--image-size", "15"], "not divisible by 2"),
        (pictures, ["--vae", str(tmp_path / "none")], "no autoencoder"),
    ):
        with pytest.raises(InputError, match=says):
            extract_features.main(arguments(data, vae, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "index.json").read_text()) | changes
    (folder / "index.json").write_text(json.dumps({key: value for key, value in index.items() if value is not None}))


BROKEN = {
    "missing": (lambda folder: (folder / "index.json").unlink(), "extract them first"),
    "no folder": (lambda folder: folder.rename(folder.with_name("elsewhere")), "extract them first"),
    "no moments": (lambda folder: (folder / "moments.npy").unlink(), "damaged"),
    "truncated moments": (lambda folder: cut_in_half(folder / "moments.npy"), "damaged"),
    "truncated labels": (lambda folder: cut_in_half(folder / "labels.npy"), "damaged"),
    "truncated index": (lambda folder: cut_in_half(folder / "index.json"), "not valid JSON"),
    "wrong count": (lambda folder: edit_index(folder, count=7), "its index says 7"),
    "wrong shape": (lambda folder: edit_index(folder, mirrors=2), "does not expect"),
    "labels out of range": (lambda folder: edit_index(folder, num_classes=2), "does not expect"),
    "incomplete index": (lambda folder: edit_index(folder, scaling_factor=None), "does not say scaling_factor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_store_that_is_missing_truncated_or_of_the_wrong_count_is_refused(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "features"
    write_features(folder, np.zeros((6, 1, 8, 4, 4)), np.arange(6) % 3, num_classes=3, vae="none", scaling_factor=1.0)
    assert len(open_features(folder)) == 6
    damage, says = BROKEN[case]
    damage(folder)
    with pytest.raises(InputError, match=says):
        open_features(folder)


def test_files_that_no_index_speaks_for_are_left_alone_and_a_kill_while_laying_out_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def writer() -> FeatureWriter:
        return FeatureWriter(tmp_path, {"count": 2, "mirrors": 1, "latent_shape": [4, 2, 2]}, torch.tensor([3, 4]))

    np.save(tmp_path / "labels.npy", np.arange(5))
    with pytest.raises(InputError, match=r"labels.npy is there, and no index.json"):
        writer().begin()
    assert np.load(tmp_path / "labels.npy").tolist() == [0, 1, 2, 3, 4] and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "labels.npy").unlink()

    lay_out = FeatureWriter._lay_out

    def killed(self: FeatureWriter) -> None:
        np.save(self.folder / "labels.npy", self.labels.numpy())
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureWriter, "_lay_out", killed)
    with pytest.raises(KeyboardInterrupt):
        writer().begin()
    monkeypatch.setattr(FeatureWriter, "_lay_out", lay_out)
    again = writer()
    again.begin()
    again.write([1], np.full((1, 1, 8, 2, 2), 0.5))
    writer().begin()  # what is stored stays
    whole = {"num_classes": 5, "vae": "pixels", "scaling_factor": 1.0}
    for value in (1, 2):  # a store takes the place of an unfinished one, and of a finished one
        write_features(tmp_path / "other", np.full((2, 1, 8, 2, 2), value), np.array([3, value]), **whole)
    assert np.load(tmp_path / "other" / "labels.npy").tolist() == [3, 2] and (np.load(tmp_path / "other" / "moments.npy") == 2).all()
    assert np.load(tmp_path / "moments.npy")[:, 0, 0, 0, 0].tolist() == [0, 0.5]


def test_moments_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not finite"):
        write_features(tmp_path, np.full((2, 1, 8, 4, 4), 1e6), np.zeros(2, dtype=int), num_classes=1, vae="none", scaling_factor=1.0)
    with pytest.raises(InputError, match="unfinished"):
        open_features(tmp_path)


def test_the_crop_is_the_middle_square_of_a_picture_of_the_right_short_side() -> None:
    wide = noisy_picture(33, 16, seed=1)
    assert np.array_equal(np.array(center_crop(wide, 16)), np.array(wide)[:, 8:24])
    tall = noisy_picture(16, 21, seed=2)
    assert np.array_equal(np.array(center_crop(tall, 16)), np.array(tall)[2:18])


@pytest.mark.parametrize("halvings", [1, 2])
def test_the_crop_halves_a_large_picture_by_the_mean_of_its_blocks(halvings: int) -> None:
    side = 16 * 2**halvings
    picture = noisy_picture(side, side, seed=3)
    expected = np.array(picture).astype(float)
    for _ in range(halvings):
        expected = expected.reshape(len(expected) // 2, 2, len(expected) // 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.array(center_crop(picture, 16)) - expected).max() <= halvings  # Pillow rounds the rows and then the columns


@pytest.mark.parametrize(("width", "height"), [(31, 31), (50, 37), (100, 65), (23, 300)])
def test_the_crop_is_bicubic_between_one_and_two_times_its_size(width: int, height: int) -> None:
    picture, short = noisy_picture(width, height, seed=4), min(width, height)
    halvings = max(0, int(np.log2(short / 16)))
    for _ in range(halvings):
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = 16 / min(picture.size)
    resized = np.array(picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC))
    top, left = (len(resized) - 16) // 2, (resized.shape[1] - 16) // 2
    assert np.array_equal(np.array(center_crop(noisy_picture(width, height, seed=4), 16)), resized[top : top + 16, left : left + 16])


def test_pictures_of_every_mode_become_rgb_on_white(tmp_path: Path) -> None:
    half = np.zeros((16, 16, 4), dtype=np.uint8)
    half[:, :8] = (200, 30, 40, 255)
    rgba = Image.fromarray(half)
    (tmp_path / "class").mkdir()
    gray = Image.fromarray(np.full((16, 16), 100, dtype=np.uint8))
    transparent_gray = Image.merge("LA", (gray, rgba.getchannel("A")))
    palette = rgba.quantize(4)
    deep = Image.fromarray(np.full((16, 16), 100 * 256 + 7, dtype=np.uint16))
    for name, picture in {"a": rgba, "b": transparent_gray, "c": palette, "d": deep, "e": gray}.items():
        picture.save(tmp_path / "class" / f"{name}.png")
    folder = ImageFolder(tmp_path, 16)
    corners = [(folder.image(k)[:, 0, 0].tolist(), folder.image(k)[:, 0, 15].tolist()) for k in range(5)]
    white, medium = [255] * 3, [100] * 3
    assert corners == [([200, 30, 40], white), (medium, white), ([200, 30, 40], white), (medium, medium), (medium, medium)]
    assert torch.equal(folder.image(0, mirror=True), folder.image(0).flip(-1)) and folder.image(0).dtype == torch.uint8


def test_a_folder_lists_its_pictures_in_one_order_and_overlooks_what_is_none(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/10.jpg", "b/inner/1.webp", "a/z.png", "a/.hidden.png", "a/notes.txt", ".cache/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noisy_picture(8, 8, 0).save(tmp_path / name) if name[-3:] != "txt" else (tmp_path / name).write_text("")
    folder = ImageFolder(tmp_path, 8)
    assert folder.names == ["a/z.png", "b/10.jpg", "b/2.PNG", "b/inner/1.webp"] and folder.class_names == ["a", "b"]
    assert folder.labels.tolist() == [0, 1, 1, 1] and folder.labels.dtype == torch.long and len(folder) == 4
    (tmp_path / "b" / "2.PNG").unlink()
    with pytest.raises(DamagedPictureError, match=r"b/2\.PNG"):
        folder.image(2)


def test_the_loading_benchmark_compares_the_store_with_memory(tmp_path: Path) -> None:
    words = ["--count", "50", "--steps", "1", "--rounds", "1", "--batch-size", "4", "--device", "cpu", "--no-gate"]
    feature_loading.main([*words, "--json", str(tmp_path / "r.json")])
    training, drawing = (case["rows"] for case in json.loads((tmp_path / "r.json").read_text())["cases"])
    assert [row["variant"] for row in training] == ["fixed latents in memory", "moments in memory", "memory-mapped store"]
    assert training[0]["speed"] == drawing[0]["speed"] == {"fixed latents": 1}
    assert all(0 < drawn["seconds"] < trained["seconds"] for trained, drawn in zip(training, drawing, strict=True))
