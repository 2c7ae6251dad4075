"""Stitched flows: the legs of a schedule along an ODE or an SDE, for any number of models.

With a fixed-step method a schedule is cut on the steps of the grid, and schedules share what they have in common, as in `tstitch.sweep`. An adaptive ODE
method chooses its own steps: there the switch is a point in time, and the solver starts anew at it. Evaluations are counted where they happen; a guided
one, which calls the network on a doubled batch, counts as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sit.transport import ODE, SDE, Transport
from sit.transport.ode import ONE_STEP
from tstitch.guidance import Denoiser, Guidance
from tstitch.monitor import Walk
from tstitch.sampling import Noise, guidance_for_each
from tstitch.schedule import StitchSchedule
from tstitch.sweep import count_shared, owners_of
from tstitch.tune import measure_seconds
from tstitch.walker import Guidances, OnEvaluation, Walked, Walker


class Guided:
    """A denoiser as a function of (x, t): guided, in batches that fit, counted.

    Args:
        denoiser: called as denoiser(x, t, y).
        y: labels (N,).
        bounds: times of the trajectory's start and end, which a guidance interval refers to.
        max_batch: most samples in a call, before guidance doubles them.
        on_call: called after each evaluation.
    """

    def __init__(
        self, denoiser: Denoiser, guidance: Guidance, y: Tensor, bounds: Sequence[float], max_batch: int, on_call: Callable[[], None] | None = None
    ) -> None:
        self.denoiser, self.guidance, self.y, self.bounds, self.max_batch, self.on_call = denoiser, guidance, y, bounds, max_batch, on_call
        self.calls = 0
        # Reading the time stalls a GPU, so it is read only where guidance asks for it.
        self.reads_time = getattr(guidance, "interval", (0.0, 1.0)) != (0.0, 1.0)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        start, stop = self.bounds
        progress = min((float(t[0]) - start) / (stop - start), 1 - 1e-6) if self.reads_time else 0.0  # below 1, as guidance expects
        batches = zip(*(part.split(self.max_batch) for part in (x, t, self.y)), strict=True)
        outputs = [self.guidance(self.denoiser, *batch, progress) for batch in batches]
        if self.on_call is not None:
            self.on_call()
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def guide(
    denoisers: Sequence[Denoiser], guidance: Guidances, y: Tensor, grid: Tensor, max_batch: int, callback: OnEvaluation | None, share: float = 1.0
) -> list[Guided]:
    """One `Guided` for each denoiser; a call counts as `share` of an evaluation of the whole batch for the callback."""
    bounds = (float(grid[0]), float(grid[-1]))
    each = guidance_for_each(guidance, len(denoisers))
    calls = [None if callback is None else lambda k=k: callback(k, share) for k in range(len(denoisers))]
    return [Guided(denoiser, guidance, y, bounds, max_batch, call) for denoiser, guidance, call in zip(denoisers, each, calls, strict=True)]


def walk_tree(
    models: Sequence[Guided], x: Tensor, owners: Sequence[Sequence[int]], advance: Callable[[Guided, Tensor, int, int], Tensor], shared: bool = True
) -> Walked:
    """Walk many trajectories of the same start.

    Args:
        owners: for each trajectory, the model of each step.
        advance: advance(model, x, a, b) takes steps a .. b - 1.
        shared: equal beginnings are walked once; False where a step remembers the ones before it.
    """
    latents: dict[int, Tensor] = {}
    evaluations: dict[int, list[float]] = {}

    def go(members: list[int], x: Tensor, at: int, spent: list[float]) -> None:
        if at == len(owners[members[0]]):
            latents.update(dict.fromkeys(members, x))
            evaluations.update(dict.fromkeys(members, spent))
            return
        for k in sorted({owners[m][at] for m in members}):
            taken = [m for m in members if owners[m][at] == k]
            stop = next((i for i in range(at, len(owners[taken[0]])) if any(owners[m][i] != k for m in taken)), len(owners[taken[0]]))
            before = models[k].calls
            onward = advance(models[k], x, at, stop)
            go(taken, onward, stop, [n + (models[k].calls - before) * (j == k) for j, n in enumerate(spent)])

    everyone = list(range(len(owners)))
    for members in [everyone] if shared else [[m] for m in everyone]:
        go(members, x, 0, [0] * len(models))
    return Walked([latents[m] for m in everyone], [evaluations[m] for m in everyone])


def flow_settings(transport: Transport) -> dict[str, object]:
    """What two results of a flow must have in common to be compared."""
    return {"path": transport.name, "prediction": transport.prediction, "sample_eps": transport.sample_eps}


def noise_levels(transport: Transport, grid: Tensor) -> list[float]:
    """Sigma / alpha at each time of a grid, infinite where there is nothing but noise."""
    return (transport.path.sigma(grid) / transport.path.alpha(grid)).tolist()


def owners_on_grid(schedule: StitchSchedule, transport: Transport, times: Tensor, num_denoisers: int) -> list[int]:
    """Denoiser of each step, where `times` are those at which steps begin.

    Raises:
        ValueError: if the schedule names a denoiser that is not there.
    """
    schedule.check_denoisers(num_denoisers)
    return owners_of(schedule.legs(len(times), sigmas=noise_levels(transport, times)))


@dataclass(frozen=True)
class ODEWalker:
    """Walks schedules along the probability-flow ODE.

    Args:
        ode: times and method.
        alone: of an adaptive method: walk each sample by itself, so that it does not depend on the others, with which it would share its steps. False
            walks the batch together, which is faster, and as published.
    """

    ode: ODE
    alone: bool = True

    @property
    def transport(self) -> Transport:
        """The flow."""
        return self.ode.transport

    @property
    def num_steps(self) -> int:
        """Times on the grid."""
        return len(self.ode.grid)

    @property
    def settings(self) -> dict[str, object]:
        """Flow, method, and what decides its steps."""
        ode = self.ode
        steps = {} if ode.adaptive else {"num_steps": self.num_steps}
        tolerances = {"atol": ode.atol, "rtol": ode.rtol} if ode.has_tolerances else {}
        return {"solver": f"ODE {ode.method}", **flow_settings(ode.transport), "times": ode.grid[[0, -1]].tolist(), **steps, **tolerances}

    def describe(self) -> str:
        """Method and number of steps."""
        return f"ODE {self.ode.method}" + ("" if self.ode.adaptive else f", {self.num_steps - 1} steps")

    @torch.no_grad()
    def walk(
        self, denoisers: Sequence[Denoiser], x_T: Tensor, y: Tensor, *, schedules: Sequence[StitchSchedule], guidance: Guidances, noise: Noise | None = None,
        max_batch: int = 64, callback: OnEvaluation | None = None,
    ) -> Walked:  # fmt: skip
        """Sample every schedule; noise is not used."""
        if self.ode.adaptive:
            return self._walk_adaptive(denoisers, x_T, y, schedules, guidance, max_batch, callback)
        grid = self.ode.grid
        models = guide(denoisers, guidance, y, grid, max_batch, callback)
        return walk_tree(models, x_T, self._owners(schedules, len(denoisers)), lambda model, x, a, b: self._advance(model, x, grid[a : b + 1]), self._shared)

    def _walk_adaptive(
        self, denoisers: Sequence[Denoiser], x_T: Tensor, y: Tensor, schedules: Sequence[StitchSchedule], guidance: Guidances, max_batch: int,
        callback: OnEvaluation | None,
    ) -> Walked:  # fmt: skip
        start, stop = self.ode.grid[[0, -1]].tolist()
        latents, evaluations = [], []
        for schedule in schedules:
            schedule.check_denoisers(len(denoisers))
            parts, counts = [], [0.0] * len(denoisers)
            for x, labels in zip(*(part.split(1 if self.alone else len(x_T)) for part in (x_T, y)), strict=True):
                share = len(x) / len(x_T)
                models = guide(denoisers, guidance, labels, self.ode.grid, max_batch, callback, share)
                for span in schedule.spans():
                    times = torch.tensor([start + (stop - start) * progress for progress in (span.start, span.stop)])
                    x = self._advance(models[span.denoiser], x, times)
                parts.append(x)
                counts = [n + share * model.calls for n, model in zip(counts, models, strict=True)]
            latents.append(torch.cat(parts))
            evaluations.append(counts)
        return Walked(latents, evaluations)

    def _advance(self, model: Guided, x: Tensor, times: Tensor) -> Tensor:
        return self.ode.integrate(self.ode.drift(model), x, times)

    @property
    def _shared(self) -> bool:
        return self.ode.method in ONE_STEP

    def _owners(self, schedules: Sequence[StitchSchedule], num_denoisers: int) -> list[list[int]]:
        return [owners_on_grid(schedule, self.ode.transport, self.ode.grid[:-1], num_denoisers) for schedule in schedules]

    def work(self, schedules: Sequence[StitchSchedule], num_denoisers: int) -> list[float] | None:
        """Evaluations of a one-step method, whose schedules share their beginnings; None for the others."""
        if not self._shared:
            return None
        return count_shared(self._owners(schedules, num_denoisers), num_denoisers, lambda i: len(ONE_STEP[self.ode.method].b))

    @torch.no_grad()
    def evaluation_seconds(
        self, denoisers: Sequence[Denoiser], x: Tensor, y: Tensor, *, guidance: Guidances, noise: Noise | None = None, repeats: int = 7
    ) -> list[float]:
        """Measured on a step in the middle of the trajectory; of an adaptive method the drift alone, of samples that are walked alone one after the other."""
        n, middle = len(x), (self.num_steps - 1) // 2
        if self.ode.adaptive and self.alone:
            x, y = x[:1], y[:1]
        models = guide(denoisers, guidance, y, self.ode.grid, len(x), None)
        if self._shared:
            calls = [lambda model=model: self._advance(model, x, self.ode.grid[middle : middle + 2]) for model in models]
            each = len(ONE_STEP[self.ode.method].b)
        else:
            t = self.ode.grid[[0, -1]].mean().to(x)
            drifts = [self.ode.drift(model) for model in models]
            calls, each = [lambda drift=drift: drift(t, x) for drift in drifts], 1
        return [seconds * n / len(x) / each for seconds in measure_seconds(calls, x.device, repeats)]


@dataclass(frozen=True)
class SDEWalker:
    """Walks schedules along an SDE; its last step is a step like the others."""

    sde: SDE

    @property
    def transport(self) -> Transport:
        """The flow."""
        return self.sde.transport

    @property
    def num_steps(self) -> int:
        """States after the first."""
        return self.sde.num_steps

    @property
    def settings(self) -> dict[str, object]:
        """Flow, method, diffusion, last step, number of steps."""
        sde = self.sde
        return {
            "solver": f"SDE {sde.method}", **flow_settings(sde.transport), "times": sde.grid[[0, -1]].tolist(), "diffusion_form": sde.form,
            "diffusion_norm": sde.norm, "last_step": sde.last_step, "last_step_size": sde.last_step_size, "num_steps": self.num_steps,
        }  # fmt: skip

    def describe(self) -> str:
        """Method and number of steps."""
        return f"SDE {self.sde.method}, {self.num_steps} steps"

    @torch.no_grad()
    def walk(
        self, denoisers: Sequence[Denoiser], x_T: Tensor, y: Tensor, *, schedules: Sequence[StitchSchedule], guidance: Guidances, noise: Noise | None,
        max_batch: int = 64, callback: OnEvaluation | None = None,
    ) -> Walked:  # fmt: skip
        """Sample every schedule with noise(i, like) at step i."""
        if noise is None:
            raise ValueError("an SDE is stochastic; pass noise=tstitch.noise.SampleNoise(seeds)")
        grid_steps = self.sde.num_steps - 1

        def advance(model: Guided, x: Tensor, a: int, b: int) -> Tensor:
            for i in range(a, b):
                x = self.sde.finish(model, x) if i == grid_steps else self.sde.step(model, x, i, noise(i, x))
            return x

        models = guide(denoisers, guidance, y, self.sde.grid, max_batch, callback)
        return walk_tree(models, x_T, self._owners(schedules, len(denoisers)), advance)

    def _owners(self, schedules: Sequence[StitchSchedule], num_denoisers: int) -> list[list[int]]:
        times = self.sde.grid if self.sde.last_step != "None" else self.sde.grid[:-1]
        return [owners_on_grid(schedule, self.sde.transport, times, num_denoisers) for schedule in schedules]

    def work(self, schedules: Sequence[StitchSchedule], num_denoisers: int) -> list[float]:
        """Evaluations of schedules that share their beginnings."""
        return count_shared(
            self._owners(schedules, num_denoisers), num_denoisers, lambda i: 1 if i == self.sde.num_steps - 1 else self.sde.evaluations_per_step
        )

    @torch.no_grad()
    def evaluation_seconds(
        self, denoisers: Sequence[Denoiser], x: Tensor, y: Tensor, *, guidance: Guidances, noise: Noise | None, repeats: int = 7
    ) -> list[float]:
        """Measured on a step in the middle of the trajectory, its noise included."""
        middle = (self.sde.num_steps - 1) // 2
        models = guide(denoisers, guidance, y, self.sde.grid, len(x), None)
        calls = [lambda model=model: self.sde.step(model, x, middle, torch.randn_like(x) if noise is None else noise(middle, x)) for model in models]
        return [seconds / self.sde.evaluations_per_step for seconds in measure_seconds(calls, x.device, repeats)]


def walk_euler(transport: Transport, num_steps: int) -> Walk:
    """How a SiT is sampled while it is trained: Euler's method, num_steps evaluations."""
    walker = ODEWalker(ODE(transport, "euler", num_steps + 1))

    def walk(model: nn.Module, x_T: Tensor, y: Tensor, guidance: Guidance) -> Tensor:
        return walker.walk([model], x_T, y, schedules=[StitchSchedule((1.0,))], guidance=guidance, max_batch=len(x_T)).latents[0]

    return walk


def flow_walker(equation: ODE | SDE, alone: bool = True) -> Walker:
    """The walker of an equation; see `ODEWalker` for `alone`."""
    return ODEWalker(equation, alone) if isinstance(equation, ODE) else SDEWalker(equation)
