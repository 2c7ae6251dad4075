"""The probability-flow ODE, dx/dt = velocity: one-step methods of our own, which never make a GPU wait, the others from torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from sit.transport.transport import Model, Transport
from tstitch.errors import InputError


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: the times, weights and result of its stages, by Butcher's letters."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


# On the grid; a step knows only where it starts. Equal to torchdiffeq's methods of these names; its rk4 is the 3/8 rule.
ONE_STEP = {
    "euler": Tableau((0,), ((),), (1,)),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun2": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "heun3": Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "rk4": Tableau((0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
IMPLICIT = ("implicit_adams", "fixed_adams")  # on the grid, with an iteration within each step
MULTISTEP = ("explicit_adams", *IMPLICIT)  # on the grid; a step remembers earlier ones
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")  # choose their own steps
ODE_METHODS = (*ADAPTIVE, *ONE_STEP, *MULTISTEP)
# How torchdiffeq says that an adaptive method finds no step that is short enough.
_GAVE_UP = ("underflow in dt", "non-finite values in state", "max_num_steps exceeded")

State = Tensor | tuple[Tensor, ...]
Drift = Callable[[Any, Any], Any]  # (time, a number or a scalar tensor; state) -> derivative, like the state


class ODE:
    """A grid of times and a method to walk it.

    Args:
        sampling_method: one of ODE_METHODS.
        num_steps: times on the grid, at least 2: fixed-step methods take num_steps - 1 steps, for adaptive ones these are only points of output.
        atol, rtol: absolute and relative tolerance of adaptive methods, over the whole batch, whose samples share their steps; for the implicit Adams
            methods, of the iteration within a step.
        reverse: from data to noise.

    Raises:
        InputError: if the method is unknown, a number is out of range, or the velocity is infinite at an end.
    """

    def __init__(
        self, transport: Transport, sampling_method: str = "dopri5", num_steps: int = 50, atol: float = 1e-6, rtol: float = 1e-3, reverse: bool = False
    ) -> None:
        if sampling_method not in ODE_METHODS:
            raise InputError(f"unknown --sampling-method '{sampling_method}' of an ODE; choose from {', '.join(ODE_METHODS)}")
        if num_steps < 2:
            raise InputError(f"an ODE needs at least 2 times, its start and its end; got {num_steps}")
        if not (atol > 0 and rtol > 0):
            raise InputError(f"--atol and --rtol must be above 0, got {atol:g} and {rtol:g}")
        self.transport, self.method, self.atol, self.rtol = transport, sampling_method, atol, rtol
        start, stop = transport.interval(reverse=reverse)
        self.grid = torch.linspace(start, stop, num_steps)
        transport.check_finite(*self.grid[[0, -1]].tolist())

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        return self.method in ADAPTIVE

    @property
    def has_tolerances(self) -> bool:
        """Whether atol and rtol decide anything."""
        return self.adaptive or self.method in IMPLICIT

    def states(self, drift: Drift, state: State, times: Tensor) -> Iterator[State]:
        """States after the first, one for each of `times` (T,) but the first.

        Raises:
            InputError: if an adaptive method finds no step that is short enough.
        """
        if self.method in ONE_STEP:
            yield from _walk(ONE_STEP[self.method], drift, state, times.tolist())
            return
        first = state[0] if isinstance(state, tuple) else state
        times = times.to(first)
        try:
            walked = odeint(drift, state, times, method=self.method, atol=self.atol, rtol=self.rtol, options=self._options(times))
        except AssertionError as error:
            if not any(words in str(error) for words in _GAVE_UP):
                raise
            raise InputError(f"{self.method} gave up ({error}); loosen --atol and --rtol, or choose a fixed-step method such as heun2") from None
        for k in range(1, len(times)):
            yield tuple(part[k] for part in walked) if isinstance(walked, tuple) else walked[k]

    def integrate(self, drift: Drift, state: State, times: Tensor) -> State:
        """State at the last of `times`; of an adaptive method the ones between are not looked at."""
        for state in self.states(drift, state, times[[0, -1]] if self.adaptive else times):  # noqa: B007, B020
            pass
        return state

    def _options(self, times: Tensor) -> dict[str, Any] | None:
        if self.method == "explicit_adams":
            return {"max_order": 5}  # which is order 4; the library's own, order 11, diverges beyond some twenty steps
        if self.adaptive and self.method != "scipy_solver":
            # Else the last step goes past the end, where a path may not exist, and the answer is interpolated. MPS has no float64.
            return {"step_t": times[-1:]} | ({"dtype": torch.float32} if times.device.type == "mps" else {})
        return None

    def drift(self, model: Model, **model_kwargs: Tensor) -> Drift:
        """Velocity of model(x, t, **model_kwargs), which is told the time as a vector (N,), within the grid."""
        first, last = sorted((float(self.grid[0]), float(self.grid[-1])))

        def velocity(t: float | Tensor, x: Tensor) -> Tensor:
            # An adaptive method guesses its first step by a look ahead, maybe past the end.
            t = min(max(t, first), last) if isinstance(t, float) else t.to(x.dtype).clamp(first, last)
            times = torch.full((len(x),), t, dtype=x.dtype, device=x.device) if isinstance(t, float) else t.expand(len(x))
            return self.transport.velocity(model(x, times, **model_kwargs), x, times)

        return velocity


def _walk(tableau: Tableau, drift: Drift, state: State, times: list[float]) -> Iterator[State]:
    """Take a step of a Runge-Kutta method between neighbouring times."""
    for start, stop in zip(times[:-1], times[1:], strict=True):
        h = stop - start
        slopes: list[State] = []
        for c, weights in zip(tableau.c, tableau.a, strict=True):
            # The last stage of heun2 and rk4 stands exactly on the next time.
            slopes.append(drift(stop if c == 1 else start + c * h, _add(state, slopes, weights, h)))
        state = _add(state, slopes, tableau.b, h)
        yield state


def _add(state: State, slopes: list[State], weights: tuple[float, ...], h: float) -> State:
    """State + h * sum of weights * slopes, part by part."""
    if isinstance(state, tuple):
        return tuple(_add(part, [slope[k] for slope in slopes], weights, h) for k, part in enumerate(state))
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            state = torch.add(state, slope, alpha=weight * h)
    return state
