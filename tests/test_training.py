"""Training: a killed run resumes to the same weights, balanced draws are balanced, and the loss really falls."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from assets.emoji.emoji_data import load_drawings
from assets.emoji.train_vae import build_vae, normalize_latents
from dit import train
from dit.checkpoints import load_dit
from dit.models import LabelEmbedder
from tstitch.checkpoints import read_weights
from tstitch.data import FeatureStore, class_weights, write_features
from tstitch.diffusion import create_diffusion
from tstitch.errors import InputError
from tstitch.presets import ROOT
from tstitch.training import EMA, JsonLines, checkpoint_files, cosine_lr, snr_weights, step_seed


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty items of three unequal classes; the latents of a class are nearly constant."""
    folder = tmp_path_factory.mktemp("features")
    labels = np.repeat([0, 1, 2], [40, 15, 5])
    mean = np.broadcast_to((labels - 1.0)[:, None, None, None], (60, 4, 8, 8))
    moments = np.concatenate([mean, np.full_like(mean, -8.0)], axis=1)[:, None]
    write_features(folder, moments, labels, num_classes=3, vae="none", scaling_factor=1.0)
    return folder


def arguments(features: Path, folder: Path, steps: int, *more: str) -> list[str]:
    return [
        "--features-path", str(features), "--model", "emoji-small", "--max-steps", str(steps), "--global-batch-size", "8", "--lr", "1e-3",
        "--results-dir", str(folder), "--ckpt-every", "3", "--log-every", "2", "--autoresume", *more,
    ]  # fmt: skip


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint_files(folder / "checkpoints")[-1], weights_only=True)
    return {f"{part}.{name}": tensor for part in ("model", "ema") for name, tensor in state[part].items()}


def test_a_run_killed_at_any_step_resumes_to_the_same_weights_and_log(features: Path, tmp_path: Path) -> None:
    steps = 60
    train.main(arguments(features, tmp_path / "whole", steps))
    command = [sys.executable, "dit/train.py", *arguments(features, tmp_path / "killed", steps)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not checkpoint_files(tmp_path / "killed" / "checkpoints"):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    reached = int(checkpoint_files(tmp_path / "killed" / "checkpoints")[-1].stem)
    assert 0 < reached < steps
    train.main(arguments(features, tmp_path / "killed", steps))
    whole, killed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("whole", "killed")]
    assert [(row["step"], row["loss"]) for row in logs[0]] == [(row["step"], row["loss"]) for row in logs[1]]


def test_a_second_round_starts_from_the_exported_average(features: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    train.main(arguments(features, tmp_path / "one", 20, "--export", str(first)))
    train.main([*arguments(features, tmp_path / "two", 1, "--export", str(second), "--init-from", str(first)), "--lr", "1e-12"])
    before, after = read_weights(first)[0], read_weights(second)[0]
    assert before["final_layer.linear.weight"].abs().max() > 0
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(InputError, match="does not fit"):
        train.main([*arguments(features, tmp_path / "three", 1, "--init-from", str(first)), "--model", "emoji-large"])


def test_training_learns_and_exports_a_file_that_says_what_it_is(features: Path, tmp_path: Path) -> None:
    export = tmp_path / "small.safetensors"
    train.main(arguments(features, tmp_path / "run", 60, "--snr-gamma", "5", "--export", str(export)))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["mse"] < 0.8 * rows[0]["mse"]
    model, reloaded = load_dit(export), read_weights(checkpoint_files(tmp_path / "run" / "checkpoints")[-1])
    assert (model.num_classes, model.latent_shape) == (3, (4, 8, 8))
    assert reloaded[1] == model.config
    ema = reloaded[0]
    assert all((tensor.float() - ema[name]).abs().max() <= 1e-3 * ema[name].abs().max() + 1e-6 for name, tensor in model.state_dict().items())


def test_a_longer_run_of_constant_learning_rate_goes_on_as_if_it_had_been_meant_so(features: Path, tmp_path: Path) -> None:
    train.main(arguments(features, tmp_path / "at_once", 7))
    train.main(arguments(features, tmp_path / "longer", 5))
    train.main(arguments(features, tmp_path / "longer", 7))
    at_once, longer = weights_of(tmp_path / "at_once"), weights_of(tmp_path / "longer")
    assert all(torch.equal(at_once[name], longer[name]) for name in at_once)
    with pytest.raises(InputError, match="at step 7 already"):
        train.main(arguments(features, tmp_path / "longer", 6))
    train.main(arguments(features, tmp_path / "cosine", 3, "--lr-schedule", "cosine"))
    with pytest.raises(InputError, match="max_steps=3"):
        train.main(arguments(features, tmp_path / "cosine", 6, "--lr-schedule", "cosine"))


def test_labels_are_dropped_in_training_at_the_given_rate_and_never_in_evaluation() -> None:
    embedder = LabelEmbedder(10, 4, dropout=0.3)
    y = torch.full((20_000,), 4)
    null = embedder.embedding_table.weight[10]
    share = (embedder.train()(y) == null).all(dim=1).float().mean().item()
    assert abs(share - 0.3) < 0.02
    assert (embedder.eval()(y) == embedder.embedding_table.weight[4]).all()


BAD_TRAINING = {
    "--lr": "-1", "--adam-betas": "0.9 1.0", "--label-dropout": "1", "--ema-decay": "1.5", "--snr-gamma": "0", "--mixed-precision": "fp16",
}  # fmt: skip


@pytest.mark.parametrize("flag", BAD_TRAINING)
def test_training_values_out_of_range_are_refused(features: Path, tmp_path: Path, flag: str) -> None:
    with pytest.raises(InputError):
        train.main(arguments(features, tmp_path / "run", 2, flag, *BAD_TRAINING[flag].split()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--max-steps", "--global-batch-size", "--ckpt-every", "--keep", "--log-every"])
def test_counts_below_one_are_refused(features: Path, tmp_path: Path, flag: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(features, tmp_path / "run", 2, flag, "0"))
    assert stopped.value.code == 2


def test_normalised_latents_have_unit_variance_and_the_same_pictures() -> None:
    drawings = load_drawings(ROOT / "assets" / "emoji" / "sample64.npz", held_out=False)
    torch.manual_seed(0)
    vae = build_vae().eval()
    x = drawings.batch(torch.arange(8))
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mean).sample
        normalize_latents(vae, drawings)
        after = vae.decode(vae.encode(x).latent_dist.mean).sample
        weights = class_weights(drawings.labels, 1.0)
        moments = vae.encode(drawings.batch(torch.arange(len(drawings.labels)))).latent_dist
    share = (weights / weights.sum()).view(-1, 1, 1, 1)
    mean = (moments.mean * share).sum(0).mean((1, 2))
    variance = ((moments.var + (moments.mean - mean.view(1, 4, 1, 1)) ** 2) * share).sum(0).mean((1, 2))
    torch.testing.assert_close(after, before, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(variance, torch.ones(4), atol=0.1, rtol=0)
    assert mean.abs().max() < 0.1


def test_a_folder_of_another_run_is_refused(features: Path, tmp_path: Path) -> None:
    train.main(arguments(features, tmp_path, 2))
    with pytest.raises(InputError, match="lr=0.001"):
        train.main([*arguments(features, tmp_path, 4), "--lr", "2e-3"])
    with pytest.raises(InputError, match="--autoresume"):
        train.main([a for a in arguments(features, tmp_path, 4) if a != "--autoresume"])
    assert len(checkpoint_files(tmp_path / "checkpoints")) == 1


def test_balanced_weights_draw_classes_evenly(features: Path) -> None:
    labels = FeatureStore(features).labels
    torch.manual_seed(0)
    for power, expected in ((0.0, [40 / 60, 15 / 60, 5 / 60]), (1.0, [1 / 3] * 3)):
        drawn = labels[torch.multinomial(class_weights(labels, power), 20_000, replacement=True)]
        assert np.allclose(drawn.bincount().numpy() / 20_000, expected, atol=0.02)


def test_features_give_scaled_posterior_draws_of_both_mirror_images(tmp_path: Path) -> None:
    moments = np.zeros((2, 2, 8, 4, 4))
    moments[0, 0, :4], moments[0, 1, :4], moments[1, :, :4] = 1.0, 3.0, -2.0
    moments[:, :, 4:] = 2 * np.log(0.1)
    write_features(tmp_path, moments, np.array([0, 1]), num_classes=2, vae="none", scaling_factor=0.5)
    latents = FeatureStore(tmp_path).latents(torch.tensor([0, 1] * 2000))
    first, second = latents[::2].mean(dim=(1, 2, 3)), latents[1::2]
    assert abs((first > 1.0).float().mean().item() - 0.5) < 0.05  # 0.5 and 1.5, equally often
    assert abs(first.mean().item() - 1.0) < 0.05
    assert abs(second.mean().item() + 1.0) < 1e-3 and abs(second.std().item() - 0.05) < 1e-3


def test_unfinished_features_are_refused(features: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="extract them first"):
        FeatureStore(tmp_path)
    for name in ("index.json", "moments.npy"):
        (tmp_path / name).write_bytes((features / name).read_bytes())
    np.save(tmp_path / "labels.npy", np.zeros(3, dtype=np.int64))
    with pytest.raises(InputError, match="extract again"):
        FeatureStore(tmp_path)


def test_step_seeds_differ_between_steps_seeds_and_ranks() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(10) for step in range(1000) for rank in range(4)}
    assert len(seeds) > 39_990  # 32 bits: a few pairs may meet


def test_the_average_of_a_constant_is_that_constant() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    for step in range(50):
        ema.update(model, step)
    assert all(torch.equal(a, b) for a, b in zip(ema.model.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        model.weight.fill_(1.0)
    before = ema.model.weight.clone()
    ema.update(model, 10_000)
    torch.testing.assert_close(ema.model.weight, 0.9 * before + 0.1)


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    factors = [cosine_lr(step, 100, warmup_steps=10, floor=0.1) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert abs(factors[-1] - 0.1) < 1e-12


def test_snr_weights_are_one_at_high_noise_and_fall_towards_the_data() -> None:
    abar = create_diffusion("").alphas_cumprod
    weights = snr_weights(abar, 5.0)
    assert torch.equal(weights[abar / (1 - abar) <= 5], torch.ones(int((abar / (1 - abar) <= 5).sum())))
    assert (weights.diff() >= 0).all() and abs(weights[0].item() - 5 / (0.9999 / 0.0001)) < 1e-6
    assert torch.equal(snr_weights(abar, None), torch.ones(1000))


def test_a_log_reopened_at_a_step_forgets_what_came_later(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLines(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step})
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # a line cut off by a kill
    JsonLines(path, 2).write({"step": 3, "again": True})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
