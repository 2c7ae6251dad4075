"""Training: a killed run resumes to the same weights, balanced draws are balanced, and the loss really falls."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dit.train
import sit.train
from assets.emoji.emoji_data import load_drawings
from assets.emoji.train_vae import build_vae, normalize_latents
from dit import train
from dit.checkpoints import load_dit
from dit.models import DiT, LabelEmbedder
from tstitch.checkpoints import read_weights
from tstitch.data import FeatureStore, class_weights, write_features
from tstitch.diffusion import GaussianDiffusion, create_diffusion
from tstitch.errors import InputError
from tstitch.files import alone_in
from tstitch.presets import ROOT
from tstitch.training import EMA, JsonLines, Prefetcher, checkpoint_files, cosine_lr, draw_batch, snr_weights, step_seed


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
        "--results-dir", str(folder), "--ckpt-every", "3", "--log-every", "2", "--ema-decay", "0.999", "--autoresume", *more,
    ]  # fmt: skip


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint_files(folder / "checkpoints")[-1], weights_only=True)
    return {f"{part}.{name}": tensor for part in ("model", "ema") for name, tensor in state[part].items()}


def kill_after(command: list[str], reached: Callable[[], bool]) -> None:
    """Start a process and SIGKILL it once `reached`; it must not end by itself."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not reached():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("train", [dit.train, sit.train], ids=lambda module: module.__name__)
def test_a_run_killed_three_times_resumes_to_the_same_weights_and_log(features: Path, tmp_path: Path, train: ModuleType) -> None:
    more = ("--gradient-accumulation-steps", "2", "--lr-schedule", "cosine", "--clip-norm", "1")
    command = [sys.executable, train.__file__, *arguments(features, tmp_path / "killed", 90, *more)]
    train.main(arguments(features, tmp_path / "whole", 90, *more))
    log = tmp_path / "killed" / "log.jsonl"
    for step in sorted(random.Random(time.time_ns()).sample(range(5, 80), 3)):
        kill_after(
            command, lambda step=step: log.exists() and any(json.loads(line)["step"] >= step for line in log.read_text().splitlines(True) if "}\n" in line)
        )
    assert 0 < int(checkpoint_files(tmp_path / "killed" / "checkpoints")[-1].stem) < 90
    train.main(arguments(features, tmp_path / "killed", 90, *more))
    whole, killed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("whole", "killed")]
    assert [(row["step"], row["loss"], row["lr"]) for row in logs[0]] == [(row["step"], row["loss"], row["lr"]) for row in logs[1]]


@pytest.mark.parametrize("balance", ["0", "0.5"])
def test_a_run_that_draws_its_batches_ahead_learns_the_same_to_the_last_bit(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, balance: str
) -> None:
    plan = train.training_plan
    for prefetch in (False, True):
        monkeypatch.setattr(train, "training_plan", lambda args, prefetch=prefetch: replace(plan(args), prefetch=prefetch))
        train.main(arguments(features, tmp_path / str(prefetch), 5, "--gradient-accumulation-steps", "2", "--class-balance", balance))
    plain, ahead = weights_of(tmp_path / "False"), weights_of(tmp_path / "True")
    assert all(torch.equal(plain[name], ahead[name]) for name in plain)


def test_a_batch_drawn_ahead_is_the_one_that_its_part_would_have_drawn_and_so_is_what_comes_after() -> None:
    drawn_in: list[str] = []

    def draw(step: int, part: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, ...]:
        drawn_in.append(threading.current_thread().name)
        return torch.randn(3, generator=generator), torch.multinomial(torch.ones(9), 4, generator=generator)

    parts = [(0, 2), (0, 3), (1, 2), (1, 3), (7, 2)]  # the last one is not the one that follows
    prefetcher = Prefetcher(draw, lambda step, part: (step, 3) if part == 2 else (step + 1, 2), seed=5)
    for step, part in parts:
        torch.manual_seed(step_seed(5, step, part))
        expected = [*draw(step, part), torch.rand(2)]
        torch.manual_seed(step_seed(5, step, part))
        found = [*prefetcher.take(step, part), torch.rand(2)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sum(name != threading.main_thread().name for name in drawn_in) >= 3


def test_an_optimizer_state_that_was_not_fused_goes_on_in_a_fused_one(features: Path, tmp_path: Path) -> None:
    train.main(arguments(features, tmp_path / "first", 4))
    path = checkpoint_files(tmp_path / "first" / "checkpoints")[-1]
    state = torch.load(path, weights_only=True)
    assert all(group["fused"] for group in state["opt"]["param_groups"])
    for name, fused in (("fused", True), ("not", None)):
        state["opt"]["param_groups"] = [group | {"fused": fused} for group in state["opt"]["param_groups"]]
        torch.save(state, tmp_path / f"{name}.pt")
        train.main(arguments(features, tmp_path / name, 2, "--load-ckpt", str(tmp_path / f"{name}.pt")))
    a, b = weights_of(tmp_path / "fused"), weights_of(tmp_path / "not")
    assert all(torch.equal(a[name], b[name]) for name in a)
    saved = torch.load(checkpoint_files(tmp_path / "not" / "checkpoints")[-1], weights_only=True)
    assert all(group["fused"] for group in saved["opt"]["param_groups"])


def test_gradient_checkpointing_changes_no_more_than_rounding(features: Path, tmp_path: Path) -> None:
    train.main(arguments(features, tmp_path / "plain", 3))
    train.main(arguments(features, tmp_path / "checkpointing", 3, "--gradient-checkpointing"))
    plain, checkpointing = weights_of(tmp_path / "plain"), weights_of(tmp_path / "checkpointing")
    assert all((plain[name] - checkpointing[name]).abs().max() < 1e-5 for name in plain)


def test_two_processes_train_as_one_that_accumulates_twice(features: Path, tmp_path: Path) -> None:
    train.main(arguments(features, tmp_path / "one", 6, "--gradient-accumulation-steps", "2"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "dit/train.py",
        *arguments(features, tmp_path / "two", 6),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert all((one[name] - two[name]).abs().max() < 1e-4 for name in one)
    logs = [json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[0])["loss"] for run in ("one", "two")]
    assert abs(logs[0] - logs[1]) < 1e-4


def test_sharded_parameters_train_average_and_resume_as_whole_ones() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, "tests/sharded_training.py"], cwd=ROOT, check=True, capture_output=True, text=True, env=one_thread)
    assert done.stdout.split() == ["True"] * 4


def test_a_published_checkpoint_goes_on_where_its_trainer_was(features: Path, tmp_path: Path) -> None:
    """Keys model, ema, opt, args; the optimizer counts its parameters, the frozen pos_embed too."""
    train.main(arguments(features, tmp_path / "first", 4))
    state = torch.load(checkpoint_files(tmp_path / "first" / "checkpoints")[-1], weights_only=True)
    numbers = {name: k for k, (name, _) in enumerate(DiT(**state["args"]["model_config"]).named_parameters())}
    groups = [group | {"params": [numbers[name] for name in group["params"]]} for group in state["opt"]["param_groups"]]
    opt = {"state": {numbers[name]: value for name, value in state["opt"]["state"].items()}, "param_groups": groups}
    published = {"model": state["model"], "ema": state["ema"], "opt": opt, "args": argparse.Namespace(model="DiT-S/4")}
    torch.save(published, tmp_path / "0000004.pt")
    torch.save({"model": state["model"], "ema": state["ema"], "opt": state["opt"], "args": {}}, tmp_path / "ours.pt")
    for name in ("0000004", "ours"):
        train.main(arguments(features, tmp_path / name, 2, "--load-ckpt", str(tmp_path / f"{name}.pt")))
    a, b = weights_of(tmp_path / "0000004"), weights_of(tmp_path / "ours")
    assert all(torch.equal(a[name], b[name]) for name in a)
    later = torch.load(checkpoint_files(tmp_path / "ours" / "checkpoints")[-1], weights_only=True)["opt"]["state"]["final_layer.linear.weight"]["step"]
    assert later == 6  # Adam goes on counting
    kept = torch.load(tmp_path / "0000004.pt", weights_only=False)["ema"]["final_layer.linear.weight"]
    assert (a["ema.final_layer.linear.weight"] - kept).abs().max() < 0.01 * (a["model.final_layer.linear.weight"] - kept).abs().max() + 1e-6
    with pytest.raises(InputError, match="--init-from"):
        train.main(arguments(features, tmp_path / "no", 2, "--load-ckpt", str(ROOT / "pretrained_models" / "emoji" / "dit-small.safetensors")))


def test_a_stitch_range_meets_only_its_own_timesteps(features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met = []
    losses = GaussianDiffusion.training_losses
    monkeypatch.setattr(GaussianDiffusion, "training_losses", lambda self, model, x_0, t, *a, **k: met.append(t) or losses(self, model, x_0, t, *a, **k))
    train.main(arguments(features, tmp_path / "run", 30, "--stitch-range", "0", "0.4"))
    t = torch.cat(met)
    assert 600 <= t.min() <= 620 and 980 <= t.max() <= 999


def test_pictures_train_without_extraction_and_any_number_of_processes_watches_them_alike(tmp_path: Path) -> None:
    drawings = load_drawings(ROOT / "assets" / "emoji" / "sample64.npz", held_out=False)
    for k in range(12):
        folder = tmp_path / "pictures" / f"class{k % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawings.images[k].permute(1, 2, 0).numpy()).save(folder / f"{k}.png")
    words = ["--data-path", str(tmp_path / "pictures"), "--image-size", "64", "--vae", str(ROOT / "pretrained_models" / "emoji" / "vae")]
    words += ["--model", "emoji-small", "--posenc", "gta", "--global-batch-size", "6", "--epochs", "2", "--log-every", "1"]
    words += ["--eval-every", "2", "--eval-extractor", "emoji", "--eval-images", "20", "--eval-batch-size", "8", "--eval-num-sampling-steps", "2"]
    train.main([*words, "--results-dir", str(tmp_path / "one"), "--gradient-accumulation-steps", "2"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, "dit/train.py", *words, "--results-dir", str(tmp_path / "two")], cwd=ROOT, check=True, capture_output=True, env=one_thread)
    one, two = ([json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("one", "two"))
    assert [row["step"] for row in one if "loss" in row] == [1, 2, 3, 4] and [row["step"] for row in one if "fd_emoji" in row] == [2, 4]
    distances = [[row["fd_emoji"] for row in rows if "fd_emoji" in row] for rows in (one, two)]
    assert distances[1] == pytest.approx(distances[0], rel=1e-3)
    assert sorted(path.name for path in (tmp_path / "two" / "previews").iterdir()) == ["0000002.png", "0000004.png"]


@pytest.mark.slow
def test_a_compiled_model_learns_what_the_plain_one_learns(features: Path, tmp_path: Path) -> None:
    train.main(arguments(features, tmp_path / "plain", 10))
    train.main(arguments(features, tmp_path / "compiled", 10, "--compile"))
    losses = [[json.loads(line)["loss"] for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


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
    "--stitch-range": "0.5 0.5", "--weight-decay": "-1", "--num-classes": "2", "--epochs": "3", "--eval-every": "-1", "--lr": "-1",
    "--adam-betas": "0.9 1.0", "--label-dropout": "1", "--ema-decay": "1.5", "--snr-gamma": "0", "--mixed-precision": "fp16", "--export": "weights.pt",
}  # fmt: skip


@pytest.mark.parametrize("flag", BAD_TRAINING)
def test_training_values_out_of_range_are_refused(features: Path, tmp_path: Path, flag: str) -> None:
    with pytest.raises(InputError):
        train.main(arguments(features, tmp_path / "run", 2, flag, *BAD_TRAINING[flag].split()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("train", [dit.train, sit.train], ids=lambda module: module.__name__)
@pytest.mark.parametrize("words", ["--eval-images 20", "--eval-extractor emoji --cfg-scale 2", "--eval-reference x.npz", "--eval-batch-size 8"])
def test_words_of_an_evaluation_without_one_are_refused(features: Path, tmp_path: Path, train: ModuleType, words: str) -> None:
    with pytest.raises(InputError, match=r"--eval-.* without --eval-every evaluates nothing; pass --eval-every STEPS"):
        train.main(arguments(features, tmp_path / "run", 2, *words.split()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("train", [dit.train, sit.train], ids=lambda module: module.__name__)
def test_an_export_onto_a_folder_is_refused_before_training(features: Path, tmp_path: Path, train: ModuleType) -> None:
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        train.main(arguments(features, tmp_path / "run", 2, "--export", str(tmp_path / "x.safetensors")))
    assert not (tmp_path / "run").exists()


def test_a_second_training_is_kept_out_of_a_folder_that_is_being_filled(features: Path, tmp_path: Path) -> None:
    with alone_in(tmp_path / "run"):
        with pytest.raises(InputError, match="another run is filling"):
            train.main(arguments(features, tmp_path / "run", 2))
        assert not list((tmp_path / "run").iterdir())
    train.main(arguments(features, tmp_path / "run", 2))


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
        normalize_latents(vae, drawings, num_draws=512)
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


def test_the_average_of_a_constant_is_that_constant_and_lending_it_leaves_no_trace() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    for step in range(50):
        ema.update(model, step)
    assert all(torch.equal(a, b) for a, b in zip(ema.average, model.parameters(), strict=True))
    with torch.no_grad():
        model.weight.fill_(1.0)
    before = ema.average[0].clone()
    ema.update(model, 10_000)
    torch.testing.assert_close(ema.average[0], 0.9 * before + 0.1)
    with ema.lent_to(model):
        assert torch.equal(model.weight, ema.average[0])
    assert (model.weight == 1.0).all()


@pytest.mark.parametrize("size", [1, 7, 20, 45])
def test_every_item_comes_once_an_epoch_however_the_batch_is_cut(size: int) -> None:
    def epochs(parts: int) -> torch.Tensor:
        steps = 20 * 60 // size // parts
        return torch.cat([draw_batch(None, 20, step=s, part=p, num_parts=parts, size=size, seed=3) for s in range(steps) for p in range(parts)])

    whole = epochs(1)
    for epoch in whole[: len(whole) // 20 * 20].view(-1, 20):
        assert torch.equal(epoch.sort().values, torch.arange(20))
    assert not torch.equal(whole[:20], whole[20:40])
    assert torch.equal(epochs(2), whole[: len(epochs(2))])


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
