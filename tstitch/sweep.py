"""Sample many schedules from the same noise: a sweep is a tree.

Schedules that agree on the first k steps share them: that prefix is walked once. Where they part, each branch goes its own way, and branches that need
the same denoiser at the same step are one batch. Eleven ratios of two denoisers over N steps cost N small steps and 5.5 N large ones instead of 11 N.

How many samples share a call moves the last bits of a result and nothing else: a matrix product rounds differently in batches of another size. Where the
batch is measured, two runs therefore agree to rounding; whoever needs the same bytes names max_batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tstitch.errors import InputError
from tstitch.guidance import Denoiser, Guidance
from tstitch.sampling import Callback, Noise, Progress, guidance_for_each, model_output, plan_legs
from tstitch.schedule import Leg, StitchSchedule
from tstitch.solvers import Solver
from tstitch.tune import wait_for

UNMEASURED = 64  # most samples in a call, before guidance doubles them, where nobody says a number and nothing is measured
GAIN = 0.97  # seconds per sample must fall to this share for a size to take another's place


class BatchSize:
    """Most samples in one call of a denoiser, before guidance doubles them: given, or found while a sweep runs.

    From where it starts, a size gives way to its double or its half for as long as that lowers the seconds per sample and memory holds. Only calls of the
    sweep itself are timed, two of each size since the first may warm up. So nothing is computed for the sake of measuring: finding out costs two calls of
    each size that is not the best, and a sweep of few samples is not measured at all.

    Args:
        given: the size, or None to find it.

    Raises:
        InputError: if the given size is below 1.
    """

    def __init__(self, given: int | None, device: torch.device) -> None:
        if given is not None and given < 1:
            raise InputError(f"max_batch must be at least 1, got {given}")
        self.found = given is None
        # A CPU's caches like few samples, and its memory no more than that; other devices want many, and few leave them idle.
        first, self.smallest, self.largest = (8, 1, 64) if device.type == "cpu" else (32, 32, 64 if device.type == "mps" else 1024)
        self.size = first if given is None else given
        # On a CPU the time that this process had, whatever else the machine does.
        self._clock = time.process_time if device.type == "cpu" else time.perf_counter
        self._seconds: dict[int, list[float]] = {}  # of calls of a size
        self._rejected: set[int] = set()

    def run(self, call: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """call(x, y) in parts that fit; x (N, C, H, W), y (N,)."""
        outputs: list[Tensor] = []
        done = 0
        while done < len(x):
            trial = self._trial(len(x) - done) if self.found else None
            part = slice(done, done + (trial or self.size))
            try:
                output = call(x[part], y[part]) if trial is None else self._timed(call, x[part], y[part])
            except torch.OutOfMemoryError:
                if not self.found or part.stop - part.start == 1:
                    raise
                output = None
            if output is None:  # outside of the handler, which holds on to what the failed call had allocated
                self._shrink(min(part.stop, len(x)) - done)
            else:
                outputs.append(output)
                done += len(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _trial(self, rows: int) -> int | None:
        """Size that the next call shall have in order to be timed; None if there is nothing to find out, or too few samples for it."""
        rivals = [size for size in (2 * self.size, self.size // 2) if self.smallest <= size <= min(self.largest, rows) and size not in self._rejected]
        if not rivals or rows < self.size:
            return None
        return self.size if len(self._seconds.get(self.size, ())) < 2 else rivals[0]

    def _timed(self, call: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """A call of the size or of a rival; decides between them when both were timed twice."""
        wait_for(x.device)
        start = self._clock()
        output = call(x, y)
        wait_for(x.device)
        seconds = self._seconds.setdefault(len(x), [])
        seconds.append(self._clock() - start)
        if len(x) != self.size and len(seconds) > 1:
            wins = min(seconds) / len(x) < GAIN * min(self._seconds[self.size]) / self.size
            self._rejected.add(self.size if wins else len(x))
            self.size = len(x) if wins else self.size
        return output

    def _shrink(self, failed: int) -> None:
        """Never again as many samples as did not fit."""
        self.largest = max(1, failed // 2)
        self.smallest, self.size = min(self.smallest, self.largest), min(self.size, self.largest)


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
    max_batch: int | Sequence[BatchSize] | None = None,
    callback: Callback | None = None,
) -> list[Tensor]:
    """Sample every schedule from the same x_T, labels and noise; the results are those of `sample` for each schedule alone, to float rounding.

    Args:
        max_batch: most samples in one denoiser call, before guidance doubles them; bounds the memory of activations. None finds the fastest for each
            denoiser on the way; a `BatchSize` for each denoiser says afterwards what was found.
        callback: called with a `Progress` after each denoiser's share of a step.
        denoisers, x_T, y, solver, guidance, noise: as in `tstitch.sampling.sample`.

    Returns:
        x_0 like x_T, one tensor for each schedule.
    """
    sizes = max_batch if isinstance(max_batch, Sequence) else [BatchSize(max_batch, x_T.device) for _ in denoisers]
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
            output = sizes[k].run(partial(model_output, denoiser, guidances[k], solver=solver, i=i), x, y.repeat(len(parts)))
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
