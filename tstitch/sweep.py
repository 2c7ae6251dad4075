"""Sample many schedules from the same noise: a sweep is a tree.

Schedules that agree on the first k steps share them: that prefix is walked once. Where they part, each branch goes its own way, and branches that need
the same denoiser at the same step are one batch. Eleven ratios of two denoisers over N steps cost N small steps and 5.5 N large ones instead of 11 N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tstitch.errors import InputError
from tstitch.guidance import Denoiser, Guidance
from tstitch.sampling import Callback, Noise, Progress, guidance_for_each, model_output, plan_legs
from tstitch.schedule import Leg, StitchSchedule
from tstitch.solvers import Solver


@dataclass(frozen=True)
class _Branch:
    """Schedules that have been equal so far, and their common state."""

    members: list[int]
    x: Tensor
    history: tuple[Tensor, ...]


def _owners(schedules: Sequence[StitchSchedule], solver: Solver, num_denoisers: int) -> list[list[int]]:
    """Denoiser of each step, for each schedule."""
    return [owners_of(plan_legs(s, solver, num_denoisers)) for s in schedules]


def owners_of(legs: Sequence[Leg]) -> list[int]:
    """Denoiser of each step."""
    return [leg.denoiser for leg in legs for _ in range(leg.start, leg.stop)]


def count_evaluations(schedules: Sequence[StitchSchedule], solver: Solver, num_denoisers: int) -> list[int]:
    """Denoiser evaluations that a sweep needs for one sample, by denoiser; guidance counts as one evaluation."""
    return count_shared(_owners(schedules, solver, num_denoisers), num_denoisers)


def count_shared(owners: Sequence[Sequence[int]], num_denoisers: int, cost: Callable[[int], int] = lambda i: 1) -> list[int]:
    """Evaluations of a tree whose branches have the given denoiser at each step, by denoiser; step i needs cost(i) of them."""
    prefixes = {tuple(path[: i + 1]) for path in owners for i in range(len(path))}
    return [sum(cost(len(prefix) - 1) for prefix in prefixes if prefix[-1] == k) for k in range(num_denoisers)]


@torch.no_grad()
def sample_many(
    denoisers: Sequence[Denoiser],
    x_T: Tensor,
    y: Tensor,
    *,
    schedules: Sequence[StitchSchedule],
    solver: Solver,
    guidance: Guidance | Sequence[Guidance | None] | None = None,
    noise: Noise | None = None,
    max_batch: int = 64,
    callback: Callback | None = None,
) -> list[Tensor]:
    """Sample every schedule from the same x_T, labels and noise; the results are those of `sample` for each schedule alone, to float rounding.

    Args:
        max_batch: most samples in one denoiser call, before guidance doubles them; bounds the memory of activations.
        callback: called with a `Progress` after each denoiser's share of a step.
        denoisers, x_T, y, solver, guidance, noise: as in `tstitch.sampling.sample`.

    Returns:
        x_0 like x_T, one tensor for each schedule.
    """
    if max_batch < 1:
        raise InputError(f"max_batch must be at least 1, got {max_batch}")
    guidances = guidance_for_each(guidance, len(denoisers))
    owners = _owners(schedules, solver, len(denoisers))
    n = len(x_T)
    branches = [_Branch(list(range(len(schedules))), x_T, ())]
    for i in range(solver.num_steps):
        drawn = noise(i, x_T) if noise is not None and solver.needs_noise else None
        grown: list[_Branch] = []
        for k, denoiser in enumerate(denoisers):
            parts = [_Branch(taken, b.x, b.history) for b in branches if (taken := [m for m in b.members if owners[m][i] == k])]
            if not parts:
                continue
            x = torch.cat([part.x for part in parts])
            labels = y.repeat(len(parts))
            chunks = zip(x.split(max_batch), labels.split(max_batch), strict=True)
            output = torch.cat([model_output(denoiser, guidances[k], some, ys, solver, i) for some, ys in chunks])
            history = tuple(torch.cat(tensors) for tensors in zip(*(part.history for part in parts), strict=True))
            tiled = None if drawn is None else drawn.repeat(len(parts), *[1] * (drawn.dim() - 1))
            step = solver.step(x, i, output, tiled, history)
            states = zip(step.x.split(n), zip(*(h.split(n) for h in step.history), strict=True) if step.history else [()] * len(parts), strict=True)
            grown += [_Branch(part.members, x_part, h_part) for part, (x_part, h_part) in zip(parts, states, strict=True)]
            if callback is not None:
                callback(Progress(i, k, step.x, step.pred_x0))
        branches = grown
    results = {member: branch.x for branch in branches for member in branch.members}
    return [results[m] for m in range(len(schedules))]
