"""What a step costs on this machine: measure each denoiser once, then every schedule is a sum (`tstitch.walker.total_seconds`)."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from tstitch.guidance import Denoiser, Guidance
from tstitch.sampling import Noise, guidance_for_each, model_output
from tstitch.solvers import Solver


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what was asked of it, before reading the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> float:
    """Most bytes that this process has held: on a GPU those that torch allocated, on a CPU the resident set; nan where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Windows has none
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_seconds(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = 7) -> list[float]:
    """Seconds of each call: the least of `repeats`, since other work only adds time.

    The calls take turns, so that a machine that slows down for a while slows all of them. Says so on stderr where other work disturbs too much.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in tqdm(range(repeats + 1), desc="measuring step times", unit="round"):
        for k, call in enumerate(calls):
            wait_for(device)
            start = time.perf_counter()
            call()
            wait_for(device)
            if repeat > 0:  # the first round warms up
                seconds[k].append(time.perf_counter() - start)
    if any(statistics.median(s) > 1.5 * min(s) for s in seconds):
        tqdm.write("warning: other work disturbs the clock; seconds and speed-ups are not to be trusted", file=sys.stderr)
    return [min(s) for s in seconds]


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
    """Seconds of one guided solver step of each denoiser for the batch x (N, C, H, W), y (N,); see `measure_seconds`."""
    middle = solver.num_steps // 2

    def step(denoiser: Denoiser, guide: Guidance) -> None:
        drawn = noise(middle, x) if noise is not None and solver.needs_noise else torch.zeros_like(x)
        solver.step(x, middle, model_output(denoiser, guide, x, y, solver, middle), drawn, (x, x, x))  # as much memory as any solver wants

    pairs = zip(denoisers, guidance_for_each(guidance, len(denoisers)), strict=True)
    return measure_seconds([partial(step, *pair) for pair in pairs], x.device, repeats)
