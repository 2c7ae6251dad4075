"""Training that diverges ends with a sentence: its last good checkpoints stay, and nothing that is not finite is written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

import dit.train
import sit.train
from tstitch.cli import run
from tstitch.data import write_features
from tstitch.errors import InputError
from tstitch.presets import ROOT
from tstitch.training import checkpoint_files, fit


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    moments = np.random.default_rng(0).standard_normal((8, 1, 8, 8, 8)).astype(np.float32)
    write_features(folder := tmp_path_factory.mktemp("features"), moments, np.arange(8) % 3, num_classes=3, vae="none", scaling_factor=1.0)
    return folder


def words(features: Path, folder: Path, *more: str) -> list[str]:
    return [
        "--features-path", str(features), "--model", "emoji-small", "--max-steps", "6", "--global-batch-size", "4", "--lr", "1e20",
        "--results-dir", str(folder), "--export", str(folder.parent / "x.safetensors"), *more,
    ]  # fmt: skip


def rows(folder: Path) -> list[dict]:
    """The log, as a strict reader takes it."""

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "log.jsonl").read_text().splitlines()]


def line(loss: Callable[[nn.Module, int], torch.Tensor], folder: Path, scaler: torch.amp.GradScaler | None = None, **how: object) -> dict[str, torch.Tensor]:
    """Train one weight to 3."""
    accelerator, model = Accelerator(cpu=True), nn.Linear(1, 1, bias=False)
    accelerator.scaler = scaler
    nn.init.ones_(model.weight)
    how = {"max_steps": 6, "ckpt_every": 1, "keep": 2, "log_every": 1, "clip_norm": None} | how
    return fit(
        model, lambda model, step, part: {"loss": loss(model, step)}, accelerator=accelerator, optimizer=torch.optim.SGD(model.parameters(), 0.1, 0.5),
        folder=folder, config={}, items_per_step=1, **how,
    )  # fmt: skip


def distance(model: nn.Module, step: int, bad_from: int = 99, factor: float = math.nan) -> torch.Tensor:
    loss = (model(torch.ones(1, 1)) - 3).square().mean()
    return loss * factor if step >= bad_from else loss


@pytest.mark.parametrize("train", [dit.train, sit.train], ids=lambda module: module.__name__)
def test_a_learning_rate_far_too_high_ends_with_code_2_and_exports_nothing(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture, train: ModuleType
) -> None:
    for log_every in ("1", "100"):
        with pytest.raises(SystemExit) as stopped:
            run(partial(train.main, words(features, tmp_path / log_every, "--log-every", log_every)))
        said = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and said.startswith("error: training diverged: at step") and "--lr" in said and "no checkpoint before it" in said
        assert all(math.isfinite(value) for row in rows(tmp_path / log_every) for value in row.values())
        assert not checkpoint_files(tmp_path / log_every / "checkpoints") and not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("how", [{}, {"log_every": 100}, {"log_every": 100, "eval_every": 1}], ids=["loss", "weights", "before an evaluation"])
def test_the_last_good_checkpoints_outlive_a_run_that_diverges(tmp_path: Path, how: dict[str, int]) -> None:
    evaluated = []
    watch = {"evaluate": lambda model, step: evaluated.append(step) or {}}
    line(distance, tmp_path / "well", **how, **watch, max_steps=4)
    with pytest.raises(InputError, match=rf"at step 5 .* not finite .*the last checkpoint, {tmp_path}.*/0000004.pt, is kept"):
        line(partial(distance, bad_from=4), tmp_path / "ill", **how, **watch)
    well, ill = (sorted((tmp_path / name / "checkpoints").iterdir()) for name in ("well", "ill"))
    assert [path.name for path in ill] == [path.name for path in well] == ["0000003.pt", "0000004.pt"]
    assert all(torch.load(path, weights_only=True)["model"]["weight"].isfinite().all() for path in ill)
    assert len(rows(tmp_path / "ill")) == (0 if how else 4) and 5 not in evaluated


def test_an_average_that_is_not_finite_is_not_exported_by_a_run_that_has_ended(tmp_path: Path) -> None:
    line(distance, tmp_path)
    path = checkpoint_files(tmp_path / "checkpoints")[-1]
    state = torch.load(path, weights_only=True)
    state["ema"]["weight"][0, 0] = math.inf
    torch.save(state, path)
    with pytest.raises(InputError, match="at step 6 the weights are not finite"):
        line(distance, tmp_path)


def test_all_processes_stop_where_one_meets_a_number_that_is_not_finite(features: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for log_every in ("1", "100"):
        command = [*launcher, "dit/train.py", *words(features, tmp_path / log_every, "--log-every", log_every)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode != 0 and "error: training diverged" in done.stderr
        assert "Traceback" not in done.stderr.split("error: training diverged")[0]
        assert not checkpoint_files(tmp_path / log_every / "checkpoints") and not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("log_every", [1, 3])
def test_steps_that_the_scaler_of_fp16_skips_are_no_error(tmp_path: Path, log_every: int) -> None:
    """At first its scale is too high; later one batch overflows."""

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        # 2^126 times the scale of 2^4 overflows until that has been halved to 2.
        return distance(model, step) if step != 4 else distance(model, step, bad_from=4, factor=math.inf if log_every == 3 else 1.0)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    average = line(loss, tmp_path, scaler, log_every=log_every, clip_norm=1.0)
    assert average["weight"].isfinite().all() and checkpoint_files(tmp_path / "checkpoints")[-1].stem == "0000006"
    assert [row["step"] for row in rows(tmp_path)] == list(range(log_every, 7, log_every))
    assert "loss" in rows(tmp_path)[0] and ("loss" in rows(tmp_path)[-1]) == (log_every == 1)


def test_a_loss_that_stays_infinite_is_an_error_with_a_scaler_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at step 6 loss is not finite"):
        line(partial(distance, bad_from=3, factor=math.inf), tmp_path, torch.amp.GradScaler("cpu"), log_every=3)
