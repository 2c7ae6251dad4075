"""What a schedule costs on this machine: measure each denoiser once, then every schedule is a sum."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from tstitch.guidance import Denoiser, Guidance
from tstitch.sampling import Noise, guidance_for_each, model_output, plan_legs
from tstitch.schedule import StitchSchedule
from tstitch.solvers import Solver


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what was asked of it, before reading the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@torch.no_grad()
def measure_step_seconds(
    denoisers: Sequence[Denoiser],
    x: Tensor,
    y: Tensor,
    *,
    solver: Solver,
    guidance: Guidance | Sequence[Guidance | None] | None = None,
    noise: Noise | None = None,
    repeats: int = 7,
) -> list[float]:
    """Seconds of one guided solver step of each denoiser for the batch x (N, C, H, W), y (N,): the least of `repeats`, since other work only adds time.

    The denoisers take turns, so that a machine that slows down for a while slows all of them. Says so on stderr where other work disturbs too much.
    """
    guidances = guidance_for_each(guidance, len(denoisers))
    middle = solver.num_steps // 2
    seconds: list[list[float]] = [[] for _ in denoisers]
    for repeat in tqdm(range(repeats + 1), desc="measuring step times", unit="round"):
        for k, (denoiser, guide) in enumerate(zip(denoisers, guidances, strict=True)):
            wait_for(x.device)
            start = time.perf_counter()
            drawn = noise(middle, x) if noise is not None and solver.needs_noise else torch.zeros_like(x)
            solver.step(x, middle, model_output(denoiser, guide, x, y, solver, middle), drawn, (x,))
            wait_for(x.device)
            if repeat > 0:  # the first round warms up
                seconds[k].append(time.perf_counter() - start)
    if any(statistics.median(s) > 1.5 * min(s) for s in seconds):
        tqdm.write("warning: other work disturbs the clock; seconds and speed-ups are not to be trusted", file=sys.stderr)
    return [min(s) for s in seconds]


def predict_seconds(schedule: StitchSchedule, solver: Solver, step_seconds: Sequence[float]) -> float:
    """Seconds to sample one batch along `schedule`: sum over its legs of steps times seconds a step."""
    return sum((leg.stop - leg.start) * step_seconds[leg.denoiser] for leg in plan_legs(schedule, solver, len(step_seconds)))
