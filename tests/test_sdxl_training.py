"""Training the small U-Net of SDXL: it learns its own part of the trajectory, nothing else changes, and a killed run resumes to the same weights."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from PIL import Image
from sd_tiny import save_tiny_pair, tiny_sdxl, tiny_unet

from sd import sdxl_data, sdxl_training, train_sdxl_tstitch
from sd.sdxl_data import (
    Batch,
    EncodedPictures,
    Placement,
    Text,
    draw_bucket_batch,
    make_buckets,
    nearest_bucket,
    read_metadata,
    weights_hash,
)
from sd.sdxl_training import Curriculum, loss_weights, stitch_losses
from tstitch.checkpoints import read_weights
from tstitch.errors import InputError
from tstitch.presets import ROOT
from tstitch.training import checkpoint_files

SIZES = [(40, 40), (33, 64), (70, 20), (32, 32), (40, 90), (31, 32)] * 2  # height, width


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny SDXL pipeline and a small U-Net on disk."""
    return save_tiny_pair(tmp_path_factory.mktemp("models"), xl=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve plain pictures of several shapes, and their captions."""
    folder = tmp_path_factory.mktemp("pictures")
    colours = np.random.default_rng(0).integers(0, 255, (len(SIZES), 3), dtype=np.uint8)
    for k, size in enumerate(SIZES):
        Image.fromarray(np.broadcast_to(colours[k], (*size, 3)).copy()).save(folder / f"{k}.png")
    write_lines(folder, [json.dumps({"file_name": f"{k}.png", "text": f"colour {k % 5}"}) for k in range(len(SIZES))])
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoded pictures, which most runs share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def words(models: tuple[Path, Path], pictures: Path, cache: Path, tmp_path: Path) -> list[str]:
    """A command line but for its run folder."""
    large, small = models
    return [
        "--pretrained_model_name_or_path", str(large), "--small_model_name_or_path", str(small), "--train_data_dir", str(pictures),
        "--cache_dir", str(cache), "--resolution", "32", "--bucket_step", "8", "--learning_rate", "2e-3", "--log_every", "4", "--checkpointing_steps", "4",
        "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip


def write_lines(folder: Path, lines: list[str]) -> Path:
    file = folder / "metadata.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    return file


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint_files(folder / "checkpoints")[-1], weights_only=True)
    return {f"{part}.{name}": tensor for part in ("model", "ema") for name, tensor in state[part].items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Metadata, shapes, batches.


def test_every_line_that_cannot_be_used_is_reported_with_its_number(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    (tmp_path / "0.png").write_bytes((pictures / "0.png").read_bytes())
    good = '{"file_name": "0.png", "text": "fine"}'
    bad = [good, "", "{", '["0.png"]', '{"file_name": "0.png"}', '{"file_name": "none.png", "text": "x"}', good, '{"file_name": "damaged.png", "text": "x"}']
    with pytest.raises(InputError) as refused:
        read_metadata(write_lines(tmp_path, bad), tmp_path)
    said = str(refused.value)
    assert "metadata.jsonl" in said
    for part in ("line 3: not JSON", "line 4: not a JSON object", "line 5: no text", "line 6: no picture", "line 8: "):
        assert part in said
    assert "line 1" not in said and "line 2" not in said and "line 7" not in said
    with pytest.raises(InputError, match="line 5: not JSON.*; and 2 more"):
        read_metadata(write_lines(tmp_path, ["{"] * 7), tmp_path)
    with pytest.raises(InputError, match="line 2: text is no string"):
        read_metadata(write_lines(tmp_path, [good, '{"file_name": "0.png", "text": 3}']), tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(good.encode() + b'\n{"file_name": "0.png", "text": "\xff"}')
    with pytest.raises(InputError, match="line 2: not UTF-8"):
        read_metadata(tmp_path / "metadata.jsonl", tmp_path)
    with pytest.raises(InputError, match="names no pictures"):
        read_metadata(write_lines(tmp_path, ["", " "]), tmp_path)
    with pytest.raises(InputError, match="metadata_file"):
        read_metadata(tmp_path / "none.jsonl", tmp_path)
    lines = read_metadata(write_lines(tmp_path, [good, "", good]), tmp_path)
    assert [(picture.line, picture.text, picture.size) for picture in lines] == [(1, "fine", (40, 40)), (3, "fine", (40, 40))]


def test_a_picture_that_lies_on_its_side_is_read_as_it_is_looked_at(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (20, 10))
    picture.paste((255, 255, 255), (0, 0, 20, 1))  # the first row, which a viewer shows as the right column
    picture.save(tmp_path / "0.webp", exif=exif, lossless=True)
    (read,) = read_metadata(write_lines(tmp_path, ['{"file_name": "0.webp", "text": ""}']), tmp_path)
    assert read.size == (20, 10)
    data = EncodedPictures([read], tiny_sdxl(), tmp_path, [(20, 10)])
    pixels = data._pixels(0)
    assert pixels.shape == (3, 20, 10) and (pixels[:, :, -1] == 255).all() and (pixels[:, :, :-1] == 0).all()


def test_at_1024_the_shapes_are_those_that_sdxl_was_trained_on() -> None:
    """Podell et al. 2023, arXiv:2307.01952, appendix I."""
    sides = {
        512: range(1856, 2049, 64), 576: range(1664, 1793, 64), 640: range(1536, 1601, 64), 704: range(1344, 1473, 64), 768: (1280, 1344), 832: (1152, 1216),
        896: (1088, 1152), 960: (1024, 1088),
    }  # fmt: skip
    tall = [(width, height) for width, heights in sides.items() for height in heights]
    assert sorted(make_buckets(1024)) == sorted([*tall, (1024, 1024), *((b, a) for a, b in tall)])
    assert make_buckets(512, 512) == [(512, 512)]
    with pytest.raises(InputError, match="--bucket_step"):
        make_buckets(32)


@pytest.mark.parametrize("size", [(40, 40), (33, 64), (70, 20), (1000, 10), (7, 5)])
def test_a_picture_covers_its_bucket_and_loses_as_little_as_it_must(size: tuple[int, int]) -> None:
    buckets = make_buckets(32, 8)
    bucket = nearest_bucket(size, buckets)
    ratio = math.log(size[1] / size[0])
    assert all(abs(math.log(bucket[1] / bucket[0]) - ratio) <= abs(math.log(w / h) - ratio) + 1e-9 for h, w in buckets)
    placed = Placement.of(size, bucket)
    assert placed.scaled[0] >= bucket[0] and placed.scaled[1] >= bucket[1] and (placed.scaled[0] == bucket[0] or placed.scaled[1] == bucket[1])
    assert abs(2 * placed.top + bucket[0] - placed.scaled[0]) <= 1 and abs(2 * placed.left + bucket[1] - placed.scaled[1]) <= 1


def test_the_crop_is_where_the_conditions_say() -> None:
    rows_and_columns = np.stack(np.meshgrid(np.arange(40), np.arange(32), indexing="ij"), axis=-1).astype(np.uint8)
    picture = Image.fromarray(np.concatenate([rows_and_columns, np.zeros((40, 32, 1), np.uint8)], axis=-1))
    placed = Placement.of((40, 32), (32, 32))
    cut = placed.cut(picture)
    assert (placed.top, placed.left) == (4, 0)
    assert cut[:2, 0, 0].tolist() == [placed.top, placed.left] and cut[:2, -1, -1].tolist() == [placed.top + 31, placed.left + 31]


def test_a_batch_has_one_shape_and_every_picture_comes_equally_often() -> None:
    bucket_of = torch.tensor([0, 1, 1, 3, 0, 1, 1, 1, 0, 1])  # one picture has a shape of its own
    for start in (0, 20):
        batches = [draw_bucket_batch(bucket_of, step=step, part=part, num_parts=2, size=3, seed=7) for step in range(start, start + 5) for part in (0, 1)]
        assert all(len(bucket_of[batch].unique()) == 1 for batch in batches)
        assert torch.cat(batches).bincount(minlength=10).tolist() == [3] * 10
    ones = [draw_bucket_batch(torch.zeros(6, dtype=torch.long), step=step, part=0, num_parts=1, size=2, seed=seed) for seed in (0, 1) for step in range(3)]
    assert sorted(torch.cat(ones[:3]).tolist()) == [0, 1, 2, 3, 4, 5]  # once before any comes again
    assert torch.cat(ones[:3]).tolist() != torch.cat(ones[3:]).tolist()
    cycles = [
        torch.cat([draw_bucket_batch(torch.zeros(6, dtype=torch.long), step=6 * k + step, part=0, num_parts=1, size=2, seed=0) for step in range(6)])
        for k in (0, 1)
    ]
    assert cycles[0].tolist() != cycles[1].tolist()  # and in an order of its own every time


# Encoding.


@pytest.mark.parametrize("zeros", [True, False])
def test_what_is_cached_is_what_the_pipeline_makes_itself(pictures: Path, tmp_path: Path, zeros: bool) -> None:
    pipe = tiny_sdxl(force_zeros_for_empty_prompt=zeros)
    data = EncodedPictures(read_metadata(pictures / "metadata.jsonl", pictures), pipe, tmp_path, make_buckets(32, 8))
    data.encode(pipe, ["another"])
    items = torch.tensor([1, 7])
    batch = data.batch(items, torch.tensor([False, True]))
    embeds, null, pooled, null_pooled = pipe.encode_prompt("colour 1")
    for ours, theirs in ((batch.text.embeds, torch.cat([embeds, null])), (batch.text.pooled, torch.cat([pooled, null_pooled]))):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    assert (batch.text.embeds[1].abs().max() == 0) == zeros
    torch.testing.assert_close(data.text(["another"]).embeds, pipe.encode_prompt("another")[0], rtol=2e-3, atol=2e-3)
    assert batch.time_ids[0].tolist() == [33, 64, *data.placements[1][1:3], *data.placements[1].bucket] and data.placements[1].bucket == (24, 40)
    posterior = pipe.vae.encode(data._pixels(1)[None] / 127.5 - 1).latent_dist
    draws = torch.stack([data.batch(items[:1], torch.tensor([False])).latents[0] for _ in range(200)]) / pipe.vae.config.scaling_factor
    assert draws.shape[1:] == (4, 6, 10)
    torch.testing.assert_close(draws.mean(0), posterior.mean[0], rtol=0, atol=5 * posterior.std.max().item() / math.sqrt(200))
    torch.testing.assert_close(draws.std(0).mean(), posterior.std.mean(), rtol=0.05, atol=0)


def test_encoding_goes_on_where_it_was_and_redoes_only_what_changed(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdxl_data, "ENCODED_TOGETHER", 4)
    pipe, read = tiny_sdxl(), read_metadata(pictures / "metadata.jsonl", pictures)
    told = []
    monkeypatch.setattr(pipe, "encode_prompt", lambda captions, _own=pipe.encode_prompt, **words: told.append(captions) or _own(captions, **words))

    def encode(lines: list, process: int = 0, num_processes: int = 1) -> dict[Path, bytes]:
        told.clear()
        EncodedPictures(lines, pipe, tmp_path, make_buckets(32, 8)).encode(pipe, process=process, num_processes=num_processes)
        return {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}

    encode(read, 0, 2)
    whole = encode(read, 1, 2)
    assert len(whole) == 12 + 5 + 1 and len(told) == 1
    for path in list(whole)[::5]:
        path.unlink()
    assert encode(read) == whole
    assert encode(read) == whole and not told
    changed = [*read[:-1], sdxl_data.CaptionedPicture(12, read[-1].file_name, read[-1].path, "new", read[-1].size)]
    assert set(encode(changed)) > set(whole) and told == [["colour 3", "colour 4", "new"]]  # what shared a call, and shares it again
    other = tiny_sdxl(seed=5)
    assert not set(EncodedPictures(read, other, tmp_path, make_buckets(32, 8))._latents) & set(whole)


def test_a_picture_that_cannot_be_decoded_is_named_with_its_line(pictures: Path, tmp_path: Path) -> None:
    whole = (pictures / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    pipe = tiny_sdxl()
    data = EncodedPictures(read_metadata(write_lines(tmp_path, ["", '{"file_name": "0.png", "text": ""}']), tmp_path), pipe, tmp_path, make_buckets(32, 8))
    with pytest.raises(InputError, match="line 2: .*0.png cannot be decoded"):
        data.encode(pipe)


# What is learned.


def test_a_curriculum_widens_from_its_start_to_the_ratio_and_stays_there() -> None:
    curriculum = Curriculum(0.4, 0.1, 31)
    ratios = [curriculum.ratio_at(step) for step in range(40)]
    assert ratios[0] == 0.1 and ratios[30:] == [0.4] * 10 and ratios[15] == pytest.approx(0.25)
    assert ratios == sorted(ratios)
    assert [curriculum.first_timestep(step, 1000) for step in (0, 15, 30, 100)] == [900, 750, 600, 600]
    assert Curriculum(1.0, 1.0).first_timestep(0, 1000) == 0
    assert Curriculum(0.3, 0.3).first_timestep(0, 50) == 35
    assert Curriculum(1e-9, 1e-9).first_timestep(0, 1000) == 999  # something is always learned


def random_batch(n: int = 3) -> tuple[Batch, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, n, 4, 8, 8, generator=generator)
    text = Text(torch.randn(n, 77, 64, generator=generator), torch.randn(n, 32, generator=generator))
    return Batch(latents, text, torch.tensor([[32.0, 32, 0, 0, 32, 32]] * n)), noise


def test_distillation_loss_is_zero_when_the_small_model_is_the_large_one() -> None:
    large, other = tiny_unet(0, xl=True), tiny_unet(1, xl=True)
    batch, noise = random_batch()
    t, scheduler = torch.tensor([999, 700, 600]), DDPMScheduler()
    settings = {"scheduler": scheduler, "weights": loss_weights(scheduler, None)}
    own = stitch_losses(large, batch, t, noise, large=large, **settings)
    assert own["distill"] == 0 and own["loss"] == own["mse"] > 0
    two = stitch_losses(other, batch, t, noise, large=large, distill_weight=0.5, **settings)
    alone = stitch_losses(other, batch, t, noise, **settings)
    assert two["distill"] > 0 and torch.equal(two["mse"], alone["mse"]) and torch.equal(two["loss"], two["mse"] + 0.5 * two["distill"])
    assert all(parameter.grad is None for parameter in large.parameters())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_is_what_the_models_predict_and_weights_are_min_snr(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    batch, noise = random_batch()
    t = torch.tensor([999, 300, 5])
    right = noise if kind == "epsilon" else scheduler.get_velocity(batch.latents, noise, t)

    def answers(error: float):
        return lambda *args, **kwargs: SimpleNamespace(sample=right + error)

    for gamma in (None, 5.0):
        weights = loss_weights(scheduler, gamma)
        assert stitch_losses(answers(0), batch, t, noise, scheduler=scheduler, weights=weights)["loss"] == 0
        snr = compute_snr(scheduler, t)
        wanted = torch.ones(3) if gamma is None else snr.clamp(max=gamma) / (snr if kind == "epsilon" else snr + 1)
        torch.testing.assert_close(weights[t], wanted, rtol=1e-4, atol=1e-6)
        loss = stitch_losses(answers(2.0), batch, t, noise, scheduler=scheduler, weights=weights)["loss"]
        torch.testing.assert_close(loss, 4 * wanted.mean(), rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="prediction_type 'sample'"):
        loss_weights(DDPMScheduler(prediction_type="sample"), None)


def test_the_loss_falls_only_the_small_unet_changes_and_timesteps_stay_in_the_curriculum(
    words: list[str], models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, met = [], []
    monkeypatch.setattr(sdxl_training, "read_part", lambda *a, _own=sdxl_training.read_part, **k: loaded.append((m := _own(*a, **k), hashes(m))) or m)
    monkeypatch.setattr(sdxl_training, "predict", lambda unet, x, t, batch, _own=sdxl_training.predict: met.append((unet, t)) or _own(unet, x, t, batch))

    def hashes(model) -> list[tuple[torch.nn.Module, str]]:
        parts = [model] if isinstance(model, torch.nn.Module) else [model.vae, model.text_encoder, model.text_encoder_2]
        return [(part, weights_hash(part)) for part in parts]

    on_disk = {path: path.read_bytes() for folder in models for path in folder.rglob("*") if path.is_file()}
    train_sdxl_tstitch.main([
        *words, "--max_train_steps", "60", "--train_batch_size", "8", "--ratio", "0.5", "--ratio_schedule", "curriculum", "--ratio_start", "0.1",
        "--enable_distill", "--snr_gamma", "5", "--log_every", "10", "--checkpointing_steps", "20", "--ema_decay", "0.9",
    ])  # fmt: skip

    log = rows(tmp_path / "run" / "log.jsonl")
    assert log[-1]["mse"] < 0.85 * log[0]["mse"] and log[-1]["loss"] < 0.85 * log[0]["loss"]
    assert log[0]["loss"] == pytest.approx(log[0]["mse"] + log[0]["distill"], rel=1e-4)

    (_, frozen), (small, ((_, small_hash),)), (large, ((_, large_hash),)) = loaded
    assert weights_hash(small) != small_hash and weights_hash(large) == large_hash
    assert len(frozen) == 3 and all(weights_hash(part) == before for part, before in frozen)
    assert {path: path.read_bytes() for path in on_disk} == on_disk

    drawn = rows(tmp_path / "run" / "timesteps-0.jsonl")
    assert [row["step"] for row in drawn] == list(range(1, 61))
    for k, row in enumerate(drawn):
        ratio = 0.1 + 0.4 * k / 59
        assert row["ratio"] == pytest.approx(ratio) and row["first"] == 1000 - math.floor(1000 * ratio + 1e-6)
        assert all(row["first"] <= t < 1000 for t in row["timesteps"])
    assert min(min(row["timesteps"]) for row in drawn[-10:]) < 600  # the range is not just kept, it is used
    for unet in (small, large):
        assert [t.tolist() for model, t in met if getattr(model, "module", model) is unet] == [row["timesteps"] for row in drawn]

    assert [path.name for path in checkpoint_files(tmp_path / "run" / "checkpoints")] == ["0000040.pt", "0000060.pt"]
    assert any((tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "run" / "unet_small").state_dict()
    state = state_of(tmp_path / "run")
    assert same(saved, {name.removeprefix("ema."): value for name, value in state.items() if name.startswith("ema.")})
    assert not same(saved, {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")})
    assert read_weights(tmp_path / "run" / "unet_small" / "diffusion_pytorch_model.safetensors")[0].keys() == saved.keys()


# A run that ends early.


def test_a_killed_run_resumes_to_the_same_weights_log_and_timesteps(words: list[str], tmp_path: Path) -> None:
    words = [
        *words, "--max_train_steps", "24", "--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--ratio_schedule", "curriculum",
        "--ratio_start", "0.1", "--enable_distill", "--gradient_checkpointing", "--lr_scheduler", "cosine", "--log_every", "3",
    ]  # fmt: skip
    train_sdxl_tstitch.main([*words, "--output_dir", str(tmp_path / "whole")])
    killed = [*words, "--output_dir", str(tmp_path / "killed"), "--resume_from_checkpoint", "latest"]
    process = subprocess.Popen([sys.executable, train_sdxl_tstitch.__file__, *killed], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = tmp_path / "killed" / "timesteps-0.jsonl"
    try:
        deadline = time.monotonic() + 300
        while not (record.exists() and record.read_text().count("\n") >= 2 * 6):  # past the first checkpoint, and between two
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert 4 <= int(checkpoint_files(tmp_path / "killed" / "checkpoints")[-1].stem) < 24
    assert not (tmp_path / "killed" / "unet_small").exists()
    train_sdxl_tstitch.main(killed)
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "killed"))
    assert (tmp_path / "whole" / "timesteps-0.jsonl").read_text() == record.read_text()
    logs = [rows(tmp_path / run / "log.jsonl") for run in ("whole", "killed")]
    assert [(row["step"], row["loss"], row["distill"]) for row in logs[0]] == [(row["step"], row["loss"], row["distill"]) for row in logs[1]]
    files = [(tmp_path / run / "unet_small" / "diffusion_pytorch_model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert files[0] == files[1]


def test_a_run_may_go_on_from_a_checkpoint_of_another_folder_and_keeps_one_history(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--max_train_steps", "8", "--train_batch_size", "2"]
    train_sdxl_tstitch.main(words)
    fourth = tmp_path / "run" / "checkpoints" / "0000004.pt"
    train_sdxl_tstitch.main([*words, "--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", str(fourth)])
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "other"))
    assert [row["step"] for row in rows(tmp_path / "other" / "timesteps-0.jsonl")] == [5, 6, 7, 8]
    with pytest.raises(InputError, match="one history"):
        train_sdxl_tstitch.main([*words, "--resume_from_checkpoint", str(fourth)])
    with pytest.raises(InputError, match="no checkpoint"):
        train_sdxl_tstitch.main([*words, "--resume_from_checkpoint", str(tmp_path / "none.pt")])
    with pytest.raises(InputError, match="--autoresume"):
        train_sdxl_tstitch.main(words)
    with pytest.raises(InputError, match="ratio=0.4"):
        train_sdxl_tstitch.main([*words, "--ratio", "0.5", "--resume_from_checkpoint", "latest"])
    train_sdxl_tstitch.main([*words, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoints" / "0000008.pt"), "--max_train_steps", "10"])
    assert checkpoint_files(tmp_path / "run" / "checkpoints")[-1].stem == "0000010"


def test_a_checkpoint_of_another_run_or_of_none_is_refused(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--train_batch_size", "1"]
    train_sdxl_tstitch.main([*words, "--max_train_steps", "4"])
    fourth, damaged, other = (tmp_path / name for name in ("run/checkpoints/0000004.pt", "damaged.pt", "other.pt"))
    damaged.write_bytes(fourth.read_bytes()[:5000])
    torch.save({"state_dict": {}}, other)
    new = [*words, "--output_dir", str(tmp_path / "new"), "--resume_from_checkpoint"]
    for more, complaint in (
        ([str(fourth), "--max_train_steps", "2"], "is at step 4 already"),
        ([str(fourth), "--max_train_steps", "6", "--ratio", "0.9"], "ratio=0.4"),
        ([str(damaged), "--max_train_steps", "6"], "damaged.pt is damaged"),
        ([str(other), "--max_train_steps", "6"], "other.pt is damaged or another trainer's; pass another checkpoint"),
    ):
        with pytest.raises(InputError, match=complaint):
            train_sdxl_tstitch.main([*new, *more])
    assert not (tmp_path / "new" / "unet_small").exists() and not (tmp_path / "new" / "config.json").exists()


def test_a_run_goes_on_only_with_the_same_pictures(pictures: Path, tmp_path: Path) -> None:
    for path in pictures.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def index() -> dict:
        return EncodedPictures(read_metadata(tmp_path / "metadata.jsonl", tmp_path), tiny_sdxl(), tmp_path, make_buckets(32, 8)).index

    before = index()
    assert index() == before
    with Image.open(tmp_path / "0.png") as picture:
        changed = picture.point(lambda value: 255 - value)
    changed.save(tmp_path / "0.png")
    assert index() != before


def test_a_pipeline_without_its_u_net_is_one_sentence(words: list[str], models: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(models[0], tmp_path / "large", ignore=shutil.ignore_patterns("unet"))
    with pytest.raises(InputError, match="could not load the large U-Net of .*large"):
        train_sdxl_tstitch.main([*words, "--pretrained_model_name_or_path", str(tmp_path / "large")])


def test_validation_pictures_are_stitched_at_the_current_ratio(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # it holds the number type of an earlier test
    asked = []
    own = sdxl_training.Previews._sample
    monkeypatch.setattr(sdxl_training.Previews, "_sample", lambda self, small, ratio: asked.append((self, ratio, own(self, small, ratio))) or asked[-1][2])
    words = [
        *words, "--max_train_steps", "3", "--train_batch_size", "1", "--ratio", "1.0", "--ratio_schedule", "curriculum", "--ratio_start", "0.5",
        "--enable_distill", "--mixed_precision", "bf16", "--ema_decay", "0",
    ]  # fmt: skip
    train_sdxl_tstitch.main([*words, "--output_dir", str(tmp_path / "unwatched")])
    prompts = ["--validation_prompt", "colour 0", "a word of its own"]
    train_sdxl_tstitch.main([*words, *prompts, "--validation_every", "1", "--validation_num_inference_steps", "4"])
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "unwatched"))
    assert all(tensor.dtype == torch.float32 for tensor in state_of(tmp_path / "run").values())
    assert [ratio for _, ratio, _ in asked] == [0.5, 0.75, 1.0]
    assert sorted(path.name for path in (tmp_path / "run" / "validation").iterdir()) == ["0000001.png", "0000002.png", "0000003.png"]
    previews, _, pictures = asked[-1]
    assert pictures.shape == (2, 3, 32, 32) and previews.pipe.unet.dtype == torch.bfloat16
    assert type(previews.pipe.unet) is UNet2DConditionModel  # given back unstitched
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_two_processes_train_as_one_that_accumulates_twice(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--max_train_steps", "4", "--train_batch_size", "2"]
    train_sdxl_tstitch.main([*words, "--output_dir", str(tmp_path / "one"), "--gradient_accumulation_steps", "2"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", train_sdxl_tstitch.__file__]
    words += ["--output_dir", str(tmp_path / "two"), "--cache_dir", str(tmp_path / "cache")]
    subprocess.run([*launcher, *words], cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, two = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4
    drawn = [rows(tmp_path / "two" / f"timesteps-{process}.jsonl") for process in (0, 1)]
    assert sorted(drawn[0] + drawn[1], key=lambda row: (row["step"], row["part"])) == rows(tmp_path / "one" / "timesteps-0.jsonl")


# Refusals.

BAD = {
    "--ratio 0": "--ratio must", "--ratio 1.1": "--ratio must", "--ratio_start 0.1": "fixed ratio", "--ratio_steps 5": "fixed ratio",
    "--ratio_schedule curriculum": "--ratio_start", "--ratio_schedule curriculum --ratio_start 0.5": "at most --ratio 0.4",
    "--ratio_schedule curriculum --ratio_start 0": "--ratio_start must", "--distill_weight 2": "--enable_distill",
    "--enable_distill --distill_weight -1": "range", "--learning_rate 0": "--learning_rate", "--snr_gamma 0": "--snr_gamma", "--ema_decay 1": "--ema_decay",
    "--proportion_empty_prompts 2": "--proportion", "--mixed_precision fp16": "CUDA", "--bucket_step 64": "--bucket_step", "--bucket_step 2": "divisible by 4",
    "--metadata_file none.jsonl": "none.jsonl", "--small_model_name_or_path /nowhere/small": "/nowhere/small",
    "--pretrained_model_name_or_path /nowhere/large": "/nowhere/large",
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD)
def test_values_that_cannot_be_used_are_refused_before_anything_is_written(words: list[str], tmp_path: Path, flags: str) -> None:
    if "fp16" in flags and torch.cuda.is_available():
        pytest.skip("has a CUDA device")
    with pytest.raises(InputError, match=BAD[flags]):
        train_sdxl_tstitch.main([*words, "--max_train_steps", "2", *flags.split()])
    assert not (tmp_path / "run").exists()


def test_a_small_unet_of_another_kind_is_refused(words: list[str], tmp_path: Path) -> None:
    tiny_unet(1, width=8, xl=True, cross_attention_dim=48).save_pretrained(tmp_path / "narrow")
    with pytest.raises(InputError, match="cross_attention_dim"):
        train_sdxl_tstitch.main([*words, "--max_train_steps", "2", "--small_model_name_or_path", str(tmp_path / "narrow")])
    assert not (tmp_path / "run").exists()


def test_8_bit_adam_without_its_package_says_what_to_install(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_sdxl_tstitch.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else True)
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        train_sdxl_tstitch.main([*words, "--use_8bit_adam"])


def test_8_bit_adam_resumes_to_the_same_weights(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    words = [*words, "--use_8bit_adam", "--max_train_steps", "8", "--train_batch_size", "2"]
    train_sdxl_tstitch.main(words)
    state = torch.load(tmp_path / "run" / "checkpoints" / "0000004.pt", weights_only=True)["opt"]["state"].values()
    assert any(tensor.dtype == torch.uint8 for one in state for part in one.values() if isinstance(part, dict) for tensor in part.values())
    fourth = str(tmp_path / "run" / "checkpoints" / "0000004.pt")
    train_sdxl_tstitch.main([*words, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", fourth])
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "resumed"))
