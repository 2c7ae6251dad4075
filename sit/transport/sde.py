"""The SDE with the same marginals: dx = (velocity + D score) dt + sqrt(2 D) dW, for any diffusion coefficient D(t) >= 0.

Ma et al. 2024, arXiv:2401.08740, Section 2.3. The grid ends a little before the data; a last step of its own goes the rest of the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sit.transport.path import DIFFUSION_FORMS, expand
from sit.transport.transport import Model, Transport
from tstitch.errors import InputError

SDE_METHODS = ("Euler", "Heun")
LAST_STEPS = ("None", "Mean", "Tweedie", "Euler")

Noise = Callable[[int, Tensor], Tensor]  # noise(i, like): standard normal values for step i


class SDE:
    """A grid of times, a method to walk it and a last step.

    Args:
        sampling_method: "Euler", or "Heun" (stochastic: the noise of a step is added first, then its drift at second order).
        diffusion_form, diffusion_norm: D(t), see `Path.diffusion`.
        last_step: from the grid's end at 1 - last_step_size to the data. "Mean": one step along the SDE's drift; "Euler": along the ODE's; "Tweedie": the
            expected data; None: none, the grid ends at 1 - sample_eps.
        last_step_size: its length in time, in (0, 1).
        num_steps: states of the trajectory after the first: num_steps - 1 steps on the grid, then the last one.

    Raises:
        InputError: if a word is unknown, a number is out of range, or drift or diffusion are infinite where they are needed.
    """

    def __init__(
        self, transport: Transport, sampling_method: str = "Euler", diffusion_form: str = "SBDM", diffusion_norm: float = 1.0, last_step: str | None = "Mean",
        last_step_size: float = 0.04, num_steps: int = 250,
    ) -> None:  # fmt: skip
        last_step = "None" if last_step is None else last_step
        words = (("sampling-method", sampling_method, SDE_METHODS), ("diffusion-form", diffusion_form, DIFFUSION_FORMS), ("last-step", last_step, LAST_STEPS))
        for flag, value, known in words:
            if value not in known:
                raise InputError(f"unknown --{flag} '{value}' of an SDE; choose from {', '.join(known)}")
        if num_steps < 2:
            raise InputError(f"an SDE needs at least 2 steps, one on the grid and the last one; got {num_steps}")
        if not 0 <= diffusion_norm < math.inf:
            raise InputError(f"--diffusion-norm must be a number of at least 0, got {diffusion_norm:g}")
        if last_step != "None" and not 0 < last_step_size < 1:
            raise InputError(f"--last-step-size must lie in (0, 1), got {last_step_size:g}; pass --last-step None for no last step")
        self.transport, self.method, self.form, self.norm = transport, sampling_method, diffusion_form, float(diffusion_norm)
        self.last_step, self.last_step_size, self.num_steps = last_step, 0.0 if last_step == "None" else last_step_size, num_steps
        start, stop = transport.interval(sde=True, diffusion_form=diffusion_form, last_step_size=self.last_step_size)
        if not start < stop:
            raise InputError(f"the trajectory would end at t = {stop:g}, before it begins at {start:g}; pass a smaller --last-step-size")
        self.grid = torch.linspace(start, stop, num_steps)
        self.dt = float(self.grid[1] - self.grid[0])
        # Euler without a last step does not look at the end.
        seen = self.grid[-2 if sampling_method == "Euler" and last_step == "None" else -1]
        transport.check_finite(float(self.grid[0]), float(seen), score=True, diffusion_form=diffusion_form)

    @property
    def evaluations_per_step(self) -> int:
        """Model evaluations of a step on the grid."""
        return 2 if self.method == "Heun" else 1

    def drift(self, model: Model, x: Tensor, t: Tensor, **model_kwargs: Tensor) -> Tensor:
        """Velocity + D score; x (N, ...), t (N,)."""
        output = model(x, t, **model_kwargs)
        return self.transport.velocity(output, x, t) + expand(self._diffusion(t), x) * self.transport.score(output, x, t)

    def step(self, model: Model, x: Tensor, i: int, noise: Tensor, **model_kwargs: Tensor) -> Tensor:
        """Step i, 0 <= i < num_steps - 1, from grid[i]; noise like x."""
        t = torch.full((len(x),), float(self.grid[i]), device=x.device, dtype=x.dtype)
        shaken = expand((2 * self._diffusion(t)).sqrt(), x) * self.dt**0.5 * noise
        if self.method == "Euler":
            return x + self.drift(model, x, t, **model_kwargs) * self.dt + shaken
        x = x + shaken
        first = self.drift(model, x, t, **model_kwargs)
        second = self.drift(model, x + self.dt * first, t + self.dt, **model_kwargs)
        return x + self.dt * (first + second) / 2

    def finish(self, model: Model, x: Tensor, **model_kwargs: Tensor) -> Tensor:
        """The last step."""
        if self.last_step == "None":
            return x
        t = torch.full((len(x),), float(self.grid[-1]), device=x.device, dtype=x.dtype)
        if self.last_step == "Mean":
            return x + self.drift(model, x, t, **model_kwargs) * self.last_step_size
        output = model(x, t, **model_kwargs)
        if self.last_step == "Euler":
            return x + self.transport.velocity(output, x, t) * self.last_step_size
        alpha, sigma = (expand(value, x) for value in (self.transport.path.alpha(t), self.transport.path.sigma(t)))
        return (x + sigma**2 * self.transport.score(output, x, t)) / alpha

    def _diffusion(self, t: Tensor) -> Tensor:
        return self.transport.path.diffusion(t, self.form, self.norm)
