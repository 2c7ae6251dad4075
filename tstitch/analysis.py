"""Why stitching works: coarse structure comes first, and denoisers of all sizes agree on it.

`walk_spectra` shows which spatial frequencies a trajectory holds at each step; `walk_similarity` how alike the predictions of several denoisers are on
the states of one trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from tstitch.diffusion.process import split_output
from tstitch.guidance import Denoiser, Guidance, no_guidance
from tstitch.sampling import Noise, Progress, model_output
from tstitch.schedule import StitchSchedule
from tstitch.solvers import Solver
from tstitch.sweep import UNMEASURED, sample_many


def radial_frequencies(size: int) -> Tensor:
    """Distance of each 2-D frequency of a size x size picture from zero, rounded to whole cycles per picture; int64 (size, size), 0 at [0, 0]."""
    cycles = torch.fft.fftfreq(size, d=1 / size, dtype=torch.float64)
    return torch.hypot(cycles[:, None], cycles[None, :]).round().long()


def radial_counts(size: int) -> Tensor:
    """How many 2-D frequencies have each radius 0, 1, 2, ... cycles per picture; float64. Above size / 2, rings are cut by the corners of the square."""
    return torch.bincount(radial_frequencies(size).flatten()).double()


def radial_power(x: Tensor) -> Tensor:
    """Power of x (N, C, S, S) at each radius, averaged over the ring, the channels and the batch; float64 (R,), R = len(radial_counts(S)).

    The transform is orthonormal: unit white noise has power 1 at each radius, and (Parseval) the sum of power times count is the mean over batch and
    channels of the sum of x squared.
    """
    power = torch.fft.fft2(x.cpu().double(), norm="ortho").abs().square().mean(dim=(0, 1))
    counts = radial_counts(x.shape[-1])
    return torch.zeros_like(counts).index_add_(0, radial_frequencies(x.shape[-1]).flatten(), power.flatten()) / counts


def walk_spectra(
    denoiser: Denoiser, x_T: Tensor, y: Tensor, *, solver: Solver, guidance: Guidance | None = None, noise: Noise | None = None, max_batch: int | None = None
) -> dict[str, Tensor]:
    """Radial power along one denoiser's trajectory; arguments as in `tstitch.sweep.sample_many`.

    Returns:
        "x_t": of the state that each step leaves behind; "x_0": of the clean sample that each step predicts. Float64 (steps, R).
    """
    rows: dict[str, list[Tensor]] = {"x_t": [], "x_0": []}

    def record(progress: Progress) -> None:
        rows["x_t"].append(radial_power(progress.x))
        rows["x_0"].append(radial_power(progress.pred_x0))

    alone = [StitchSchedule((1.0,))]
    sample_many([denoiser], x_T, y, schedules=alone, solver=solver, guidance=guidance, noise=noise, max_batch=max_batch, callback=record)
    return {name: torch.stack(powers) for name, powers in rows.items()}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine between two batches (N, ...), each element of the batch as one vector; (N,) in -1..1."""
    return F.cosine_similarity(a.flatten(1).cpu().double(), b.flatten(1).cpu().double(), dim=1)


def walk_similarity(
    denoisers: Sequence[Denoiser],
    x_T: Tensor,
    y: Tensor,
    *,
    solver: Solver,
    guidance: Guidance | None = None,
    noise: Noise | None = None,
    max_batch: int | None = None,
) -> dict[tuple[int, int], Tensor]:
    """Cosine of the predicted noise of each pair of denoisers, on the states that the last denoiser's trajectory goes through.

    Arguments as in `tstitch.sweep.sample_many`.

    On the first steps a state is nearly all noise, so even poor predictions of it are alike; what tells is how long they stay so.

    Returns:
        (j, k), j < k -> float64 (steps, N).
    """
    rows: dict[tuple[int, int], list[Tensor]] = {pair: [] for pair in combinations(range(len(denoisers)), 2)}
    x = x_T

    def predict(denoiser: Denoiser, i: int) -> Tensor:
        parts = zip(x.split(max_batch or UNMEASURED), y.split(max_batch or UNMEASURED), strict=True)
        return torch.cat([split_output(model_output(denoiser, guidance or no_guidance, some, ys, solver, i), some)[0] for some, ys in parts])

    def record(progress: Progress) -> None:
        nonlocal x  # the state before the step; progress has the one after it
        predictions = [predict(denoiser, progress.step) for denoiser in denoisers]
        for (j, k), cosines in rows.items():
            cosines.append(cosine(predictions[j], predictions[k]))
        x = progress.x

    alone = [StitchSchedule((1.0,))]
    sample_many([denoisers[-1]], x_T, y, schedules=alone, solver=solver, guidance=guidance, noise=noise, max_batch=max_batch, callback=record)
    return {pair: torch.stack(cosines) for pair, cosines in rows.items()}
