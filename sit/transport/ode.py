"""The probability-flow ODE, dx/dt = velocity, integrated by torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from sit.transport.transport import Model, Transport
from tstitch.errors import InputError

ONE_STEP = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}  # on the grid: evaluations of a step, which knows only where it starts
MULTISTEP = ("explicit_adams", "implicit_adams", "fixed_adams")  # on the grid; a step remembers earlier ones
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")  # choose their own steps
ODE_METHODS = (*ADAPTIVE, *ONE_STEP, *MULTISTEP)

Drift = Callable[[Tensor, Tensor], Tensor]  # (scalar time, state) -> derivative


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
        transport.check_finite(start, stop)
        self.grid = torch.linspace(start, stop, num_steps)

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        return self.method in ADAPTIVE

    def integrate(self, drift: Drift, state: Tensor | tuple[Tensor, ...], times: Tensor) -> Tensor | tuple[Tensor, ...]:
        """States at `times` (T,), stacked in front; the first is the initial one.

        Raises:
            InputError: if an adaptive method finds no step that is short enough.
        """
        try:
            return odeint(drift, state, times, method=self.method, atol=self.atol, rtol=self.rtol, options=self._options(times))
        except AssertionError as error:
            raise InputError(f"{self.method} gave up ({error}); loosen --atol and --rtol, or choose a fixed-step method such as heun2") from None

    def _options(self, times: Tensor) -> dict[str, Any] | None:
        if self.method == "explicit_adams":
            return {"max_order": 5}  # which is order 4; the library's own, order 11, diverges beyond some twenty steps
        if self.adaptive and self.method != "scipy_solver":
            return {"step_t": times[-1:]}  # else the last step goes past the end, where a path may not exist, and the answer is interpolated
        return None

    def drift(self, model: Model, **model_kwargs: Tensor) -> Drift:
        """Velocity of model(x, t, **model_kwargs), which is told the time as a vector (N,), within the grid."""
        first, last = sorted((float(self.grid[0]), float(self.grid[-1])))

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            times = t.to(x.dtype).clamp(first, last).expand(len(x))  # a first step is guessed by a look ahead, maybe past the end
            return self.transport.velocity(model(x, times, **model_kwargs), x, times)

        return velocity
