"""Interpolants: x_t = alpha(t) x_1 + sigma(t) x_0, from noise x_0 ~ N(0, I) at t = 0 to data x_1 at t = 1.

Albergo et al. 2023, "Stochastic Interpolants", arXiv:2303.08797; Ma et al. 2024, "SiT", arXiv:2401.08740, Section 2. Everything is a function of t (N,)
and elementwise over the batch. With r = alpha' / alpha and g = r sigma^2 - sigma sigma', the three things a model can predict are one another's images:

    velocity = r x + g score        score = -noise / sigma        velocity = r x - (r sigma - sigma') noise
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tstitch.errors import InputError

DIFFUSION_FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Reshape t (N,) so that it multiplies like (N, ...) row by row."""
    return t.view(-1, *[1] * (like.dim() - 1))


class Path(ABC):
    """An interpolant. All methods take t (N,) in [0, 1] and give (N,), or things shaped like x (N, ...)."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Share of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Share of the noise."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma."""

    @abstractmethod
    def rate(self, t: Tensor) -> Tensor:
        """Rate r = alpha' / alpha."""

    def gain(self, t: Tensor) -> Tensor:
        """Gain g = r sigma^2 - sigma sigma': what the score is multiplied by in the velocity."""
        sigma = self.sigma(t)
        return self.rate(t) * sigma**2 - sigma * self.d_sigma(t)

    def interpolate(self, t: Tensor, x_0: Tensor, x_1: Tensor) -> tuple[Tensor, Tensor]:
        """x_t, and its velocity alpha' x_1 + sigma' x_0."""
        at = lambda value: expand(value, x_1)  # noqa: E731
        x_t = at(self.alpha(t)) * x_1 + at(self.sigma(t)) * x_0
        return x_t, at(self.d_alpha(t)) * x_1 + at(self.d_sigma(t)) * x_0

    def velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity r x + g score."""
        return expand(self.rate(t), x) * x + expand(self.gain(t), x) * score

    def velocity_from_noise(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity r x - (r sigma - sigma') noise; unlike -g noise / sigma it is finite where sigma = 0, if sigma' is."""
        rate = self.rate(t)
        return expand(rate, x) * x - expand(rate * self.sigma(t) - self.d_sigma(t), x) * noise

    def score_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """(q v - x) / (sigma^2 - q sigma' sigma) with q = alpha / alpha' = 1 / r, which is finite at t = 0."""
        q, sigma = self._inverse_rate(t), self.sigma(t)
        return (expand(q, x) * velocity - x) / expand(sigma**2 - q * self.d_sigma(t) * sigma, x)

    def noise_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """(q v - x) / (q sigma' - sigma)."""
        q = self._inverse_rate(t)
        return (expand(q, x) * velocity - x) / expand(q * self.d_sigma(t) - self.sigma(t), x)

    def _inverse_rate(self, t: Tensor) -> Tensor:
        return self.alpha(t) / self.d_alpha(t)

    def diffusion(self, t: Tensor, form: str = "constant", norm: float = 1.0) -> Tensor:
        """Diffusion coefficient D(t) >= 0 of the SDE dx = (v + D score) dt + sqrt(2 D) dW; any of them keeps the marginals of x_t.

        Raises:
            InputError: if the form is unknown.
        """
        if form == "constant":
            return torch.full_like(t, norm)
        if form == "SBDM":
            return norm * self.gain(t)
        if form == "sigma":
            return norm * self.sigma(t)
        if form == "linear":
            return norm * (1 - t)
        if form == "decreasing":
            return 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2
        if form == "increasing-decreasing":
            return norm * torch.sin(math.pi * t) ** 2
        raise InputError(f"unknown diffusion form '{form}'; choose from {', '.join(DIFFUSION_FORMS)}")


class Linear(Path):
    """alpha = t, sigma = 1 - t."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def rate(self, t: Tensor) -> Tensor:
        return 1 / t


class GVP(Path):
    """Generalised variance preserving: alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(math.pi / 2 * t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def rate(self, t: Tensor) -> Tensor:
        return math.pi / 2 / torch.tan(math.pi / 2 * t)


class VP(Path):
    """Variance preserving, the process of DDPM in continuous time: alpha = exp(L), sigma = sqrt(1 - alpha^2).

    L(t) = -(1 - t)^2 (b1 - b0) / 4 - (1 - t) b0 / 2. Song et al. 2021, "Score-based generative modeling through SDEs", arXiv:2011.13456, Eq. 33,
    with time reversed.
    """

    b0, b1 = 0.1, 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * (1 - t) ** 2 * (self.b1 - self.b0) - 0.5 * (1 - t) * self.b0

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()  # 1 - exp() would lose all digits near t = 1

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.rate(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -(self.alpha(t) ** 2) * self.rate(t) / self.sigma(t)

    def rate(self, t: Tensor) -> Tensor:
        return 0.5 * (1 - t) * (self.b1 - self.b0) + 0.5 * self.b0

    def gain(self, t: Tensor) -> Tensor:
        """Half of beta(t): equal to r, since alpha^2 + sigma^2 = 1; the general formula is 0 * infinity at t = 1."""
        return self.rate(t)

    def _inverse_rate(self, t: Tensor) -> Tensor:
        return 1 / self.rate(t)


PATHS: dict[str, type[Path]] = {"Linear": Linear, "GVP": GVP, "VP": VP}
