"""What scripts need of a way to sample: walk many schedules, say what each cost in evaluations, and how long an evaluation takes here.

`SolverWalker` is the one of the step-by-step solvers; a backbone with trajectories of another kind (the flows of `sit/`) brings its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tstitch.guidance import Denoiser, Guidance
from tstitch.sampling import Noise, plan_legs
from tstitch.schedule import StitchSchedule, steps_by_denoiser
from tstitch.solvers import Solver
from tstitch.sweep import BatchSize, count_evaluations, sample_many
from tstitch.tune import measure_step_seconds

Guidances = Guidance | Sequence[Guidance | None] | None
OnEvaluation = Callable[[int, float], None]  # (denoiser, evaluations of the whole batch that were just done)


class Walked(NamedTuple):
    """Samples of many schedules, and what each would have cost alone."""

    latents: list[Tensor]  # one (N, C, H, W) for each schedule
    evaluations: Sequence[Sequence[float]]  # for each schedule, guided evaluations a sample by denoiser; an adaptive method's differ between samples: the mean
    max_batch: list[int] | None = None  # most samples in a call of each denoiser, where the walker finds or is told it


class Walker(Protocol):
    """A way to sample."""

    num_steps: int  # what --num-sampling-steps said

    @property
    def settings(self) -> dict[str, object]:
        """What two results must have in common to be compared."""

    def describe(self) -> str:
        """A few words for a title."""

    def walk(
        self, denoisers: Sequence[Denoiser], x_T: Tensor, y: Tensor, *, schedules: Sequence[StitchSchedule], guidance: Guidances, noise: Noise | None,
        max_batch: int | None, callback: OnEvaluation | None = None,
    ) -> Walked:  # fmt: skip
        """Sample every schedule from the same x_T (N, C, H, W), labels (N,) and noise; `SolverWalker` measures a max_batch that is None."""

    def work(self, schedules: Sequence[StitchSchedule], num_denoisers: int) -> Sequence[float] | None:
        """Evaluations of the whole batch that `walk` will do, by denoiser, where that is known before."""

    def evaluation_seconds(
        self, denoisers: Sequence[Denoiser], x: Tensor, y: Tensor, *, guidance: Guidances, noise: Noise | None, repeats: int = 7
    ) -> list[float]:
        """Seconds of one guided evaluation of each denoiser for the batch x (N, C, H, W), y (N,), the solver's share of the work included."""


@dataclass(frozen=True)
class SolverWalker:
    """Walks schedules as one tree, by a solver of `tstitch.solvers`."""

    solver: Solver

    @property
    def num_steps(self) -> int:
        """Steps of the solver."""
        return self.solver.num_steps

    @property
    def settings(self) -> dict[str, object]:
        """Solver, number of steps, their spacing."""
        return {"solver": type(self.solver).__name__, "num_steps": self.num_steps, "spacing": "even"}

    def describe(self) -> str:
        """Number of steps."""
        return f"{self.num_steps} steps"

    def walk(
        self, denoisers: Sequence[Denoiser], x_T: Tensor, y: Tensor, *, schedules: Sequence[StitchSchedule], guidance: Guidances, noise: Noise | None,
        max_batch: int | None = None, callback: OnEvaluation | None = None,
    ) -> Walked:  # fmt: skip
        """See `tstitch.sweep.sample_many`."""
        sizes = [BatchSize(max_batch, x_T.device) for _ in denoisers]
        latents = sample_many(
            denoisers, x_T, y, schedules=schedules, solver=self.solver, guidance=guidance, noise=noise, max_batch=sizes,
            callback=None if callback is None else lambda progress: callback(progress.denoiser, len(progress.x) / len(x_T)),
        )  # fmt: skip
        evaluations = [steps_by_denoiser(plan_legs(schedule, self.solver, len(denoisers)), len(denoisers)) for schedule in schedules]
        return Walked(latents, evaluations, [size.size for size in sizes])

    def work(self, schedules: Sequence[StitchSchedule], num_denoisers: int) -> Sequence[float]:
        """See `tstitch.sweep.count_evaluations`."""
        return count_evaluations(schedules, self.solver, num_denoisers)

    @torch.no_grad()
    def evaluation_seconds(
        self, denoisers: Sequence[Denoiser], x: Tensor, y: Tensor, *, guidance: Guidances, noise: Noise | None, repeats: int = 7
    ) -> list[float]:
        """See `tstitch.tune.measure_step_seconds`."""
        return measure_step_seconds(denoisers, x, y, solver=self.solver, guidance=guidance, noise=noise, repeats=repeats)


def total_seconds(evaluations: Sequence[float], seconds: Sequence[float]) -> float:
    """Seconds of a trajectory: evaluations of each denoiser times seconds of one."""
    return sum(n * s for n, s in zip(evaluations, seconds, strict=True))
