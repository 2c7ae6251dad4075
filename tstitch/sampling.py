"""Walk one trajectory: the legs of a schedule, each with its denoiser.

The legs are known before the first step. The loop hands host integers to the solver and never asks a tensor where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tstitch.errors import InputError
from tstitch.guidance import Denoiser, Guidance, no_guidance
from tstitch.schedule import Leg, StitchSchedule
from tstitch.solvers import Solver

Noise = Callable[[int, Tensor], Tensor]


class Progress(NamedTuple):
    """What a callback sees after a solver step: x and pred_x0 are (N, C, H, W), in a sweep those of all branches that took the step together."""

    step: int
    denoiser: int
    x: Tensor
    pred_x0: Tensor


Callback = Callable[[Progress], None]


def plan_legs(schedule: StitchSchedule, solver: Solver, num_denoisers: int) -> list[Leg]:
    """Legs of `schedule` on the steps of `solver`.

    Raises:
        InputError: if the schedule names a denoiser that is not there.
    """
    legs = schedule.legs(solver.num_steps, timesteps=solver.timesteps, sigmas=solver.sigmas)
    schedule.check_denoisers(num_denoisers)
    return legs


def guidance_for_each(guidance: Guidance | Sequence[Guidance | None] | None, num_denoisers: int) -> list[Guidance]:
    """One guidance for each denoiser; None is no guidance.

    Raises:
        InputError: if a list has another length than the denoisers.
    """
    each = list(guidance) if isinstance(guidance, Sequence) else [guidance] * num_denoisers
    if len(each) != num_denoisers:
        raise InputError(f"got {len(each)} guidance settings for {num_denoisers} denoisers; pass one, or one for each")
    return [no_guidance if one is None else one for one in each]


def model_output(denoiser: Denoiser, guidance: Guidance, x: Tensor, y: Tensor, solver: Solver, i: int) -> Tensor:
    """Guided prediction for step i of a batch."""
    t = torch.full((len(x),), solver.timesteps[i], device=x.device)
    return guidance(denoiser, x, t, y, i / solver.num_steps)


@torch.no_grad()
def sample(
    denoisers: Sequence[Denoiser],
    x_T: Tensor,
    y: Tensor,
    *,
    schedule: StitchSchedule,
    solver: Solver,
    guidance: Guidance | Sequence[Guidance | None] | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample along one schedule.

    Args:
        denoisers: in the order the schedule numbers them; each is called as denoiser(x, t, y).
        x_T: initial noise (N, C, H, W), unit variance.
        y: labels (N,).
        guidance: for all denoisers, or a list with one for each.
        noise: noise(step, like) -> tensor, for stochastic solvers; `tstitch.noise.SampleNoise`.
        callback: called with a `Progress` after each step.

    Returns:
        x_0, like x_T.
    """
    guidances = guidance_for_each(guidance, len(denoisers))
    x = x_T
    history: tuple[Tensor, ...] = ()
    for leg in plan_legs(schedule, solver, len(denoisers)):
        denoiser, guide = denoisers[leg.denoiser], guidances[leg.denoiser]
        for i in range(leg.start, leg.stop):
            output = model_output(denoiser, guide, x, y, solver, i)
            drawn = noise(i, x) if noise is not None and solver.needs_noise else None
            x, pred_x0, history = solver.step(x, i, output, drawn, history)
            if callback is not None:
                callback(Progress(i, leg.denoiser, x, pred_x0))
    return x
