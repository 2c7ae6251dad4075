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

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from sd_tiny import save_tiny_pair, tiny_unet, write_pictures

from sd import sdxl_training, train_sdxl_tstitch
from sd.sdxl_data import Batch, Text, weights_hash
from sd.sdxl_training import Curriculum, loss_weights, stitch_losses
from tstitch.checkpoints import read_weights
from tstitch.errors import InputError
from tstitch.presets import ROOT
from tstitch.training import checkpoint_files


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny SDXL pipeline and a small U-Net on disk."""
    return save_tiny_pair(tmp_path_factory.mktemp("models"), xl=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


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


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint_files(folder / "checkpoints")[-1], weights_only=True)
    return {f"{part}.{name}": tensor for part in ("model", "ema") for name, tensor in state[part].items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
