"""What every trainer shares: a loop that survives a kill, EMA, atomic checkpoints.

Everything random in step k comes from `step_seed(seed, k, rank)`: the batch, the timesteps, the noise, the dropped labels. So a resumed run draws what
the undisturbed run would have drawn, and no generator state has to be stored.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from tstitch.errors import InputError
from tstitch.files import atomic_path, write_json


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of one training step: a 32-bit mix of (seed, step, rank), so that neighbouring steps share no stream."""
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (value ^ (value >> 31)) & 0xFFFFFFFF


def cosine_lr(step: int, max_steps: int, warmup_steps: int = 0, floor: float = 0.0) -> float:
    """Learning-rate factor in [floor, 1]: linear warm-up, then half a cosine down to `floor` at max_steps."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def snr_weights(alphas_cumprod: np.ndarray, gamma: float | None) -> Tensor:
    """Loss weight of each timestep for noise prediction, min(SNR, gamma) / SNR; all ones without gamma.

    Hang et al. 2023, arXiv:2303.09556, Eq. 6: the many nearly clean timesteps, whose noise is hard to see, no longer drown the others.
    """
    if gamma is None:
        return torch.ones(len(alphas_cumprod))
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return torch.from_numpy(np.minimum(snr, gamma) / snr).float()


class EMA:
    """Exponential moving average of a module's parameters; buffers are copied.

    Early on the decay is (1 + step) / (10 + step), so that a short run is not an average with its random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards `model` after optimizer step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for average, current in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(current)


def checkpoint_files(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first; their names are their steps."""
    return sorted((path for path in folder.glob("*.pt") if path.stem.isdigit()), key=lambda path: int(path.stem))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write {step:07d}.pt atomically and remove all but the newest `keep` checkpoints."""
    path = folder / f"{step:07d}.pt"
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
    for old in checkpoint_files(folder)[:-keep]:
        old.unlink()
    return path


class JsonLines:
    """A log of one JSON object a line; opening it at step k forgets the lines of later steps, which a resumed run writes again."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def fit(
    model: nn.Module,
    losses: Callable[[nn.Module, int], dict[str, Tensor]],
    *,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    config: dict[str, Any],
    max_steps: int,
    lr_factor: Callable[[int], float] = lambda step: 1.0,
    ema_decay: float = 0.999,
    clip_norm: float | None = 1.0,
    seed: int = 0,
    ckpt_every: int = 500,
    keep: int = 2,
    log_every: int = 50,
    resume: bool = True,
) -> nn.Module:
    """Train `model` to `max_steps` and return its EMA; a run that was killed goes on from its newest checkpoint.

    Args:
        model: the bare module; it is prepared (device, distribution, mixed precision) here.
        losses: called as losses(model, step), returns scalars; "loss" is differentiated, all are logged. Runs under `step_seed`.
        folder: run folder, on a disk that all processes share; gets config.json, log.jsonl and checkpoints/{step:07d}.pt with keys model, ema, opt,
            args, step, log (and scaler in fp16).
        config: plain values that describe the run, "max_steps" among them; a folder begun with another config is refused. Only a run of constant
            "lr_schedule" may be made longer: any other would have learned differently from its first step.
        lr_factor: factor on the optimizer's learning rate for a step.
        clip_norm: largest gradient norm, None for no clipping.
        resume: False starts anew and refuses a folder that already holds checkpoints.

    Raises:
        InputError: if the folder belongs to another run.
    """
    checkpoints = folder / "checkpoints"
    config = config | {"max_steps": max_steps, "num_processes": accelerator.num_processes}
    state = _resumable_state(checkpoints, config, resume)
    ema = EMA(model, ema_decay)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    start, count, sums = 0, 0, {}
    if state is not None:
        model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["opt"])
        start, count = state["step"], state["log"]["count"]
        sums = {name: value.to(accelerator.device) for name, value in state["log"]["sums"].items()}
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
    ema.model.to(accelerator.device)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(prepared, keep_torch_compile=False)
    main = accelerator.is_main_process
    log = JsonLines(folder / "log.jsonl", start) if main else None
    if main:
        write_json(folder / "config.json", config)
        for left_by_a_kill in checkpoints.glob(".*.tmp.pt"):
            left_by_a_kill.unlink()

    bar = tqdm(total=max_steps, initial=start, desc=folder.name, unit="step", disable=not main, mininterval=1.0)
    since, rated = time.perf_counter(), start
    for step in range(start, max_steps):
        torch.manual_seed(step_seed(seed, step, accelerator.process_index))
        for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = base * lr_factor(step)
        terms = losses(prepared, step)
        accelerator.backward(terms["loss"])
        if clip_norm is not None:
            terms["grad_norm"] = accelerator.clip_grad_norm_(prepared.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(bare, step)
        # Summed on the device: reading a loss at every step would stall a GPU.
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach().float()
        done, count = step + 1, count + 1
        bar.update()
        if done % log_every == 0 or done == max_steps:
            row = {name: accelerator.reduce(value, "mean").item() / count for name, value in sums.items()}
            now = time.perf_counter()
            if main:
                log.write({"step": done, **{k: round(v, 6) for k, v in row.items()}, "steps_per_s": round((done - rated) / (now - since), 3)})
                bar.set_postfix({k: f"{v:.4f}" for k, v in row.items()})
            sums, count, since, rated = {}, 0, now, done
        if main and (done % ckpt_every == 0 or done == max_steps):
            state = {"model": bare.state_dict(), "ema": ema.model.state_dict(), "opt": optimizer.state_dict(), "args": config, "step": done}
            state["log"] = {"count": count, "sums": sums}  # so that the next line of the log is the same after a resume
            if accelerator.scaler is not None:
                state["scaler"] = accelerator.scaler.state_dict()
            save_checkpoint(checkpoints, done, state, keep)
    bar.close()
    accelerator.wait_for_everyone()
    return ema.model


def _resumable_state(checkpoints: Path, config: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """Newest checkpoint of this run, or None at its start."""
    files = checkpoint_files(checkpoints) if checkpoints.is_dir() else []
    if not files:
        return None
    if not resume:
        raise InputError(f"{checkpoints} already holds {len(files)} checkpoints; continue them with --autoresume or choose another --results-dir")
    state = torch.load(files[-1], map_location="cpu", weights_only=True)
    growing = {"max_steps"} if config.get("lr_schedule") == "constant" else set()
    changed = sorted(k for k in (config.keys() | state["args"].keys()) - growing if config.get(k) != state["args"].get(k))
    if changed:
        was = ", ".join(f"{k}={state['args'].get(k)!r}" for k in changed)
        raise InputError(f"{checkpoints} was begun with {was}; pass the same values or choose another --results-dir")
    if state["step"] > config["max_steps"]:
        raise InputError(f"{checkpoints} is at step {state['step']} already; pass a larger --max-steps or choose another --results-dir")
    return state
