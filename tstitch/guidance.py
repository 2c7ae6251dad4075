"""Guidance: how one denoiser's conditional prediction is pushed, by its own unconditional one or by a weaker model.

A guidance object is called as guidance(denoiser, x, t, y, progress) with the plain batch and returns a model output of that batch; the doubling of the
batch happens here. Only noise channels are guided, variance channels stay the conditional ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tstitch.errors import InputError


class Denoiser(Protocol):
    """Predicts eps (N, C, H, W), or eps and variance (N, 2C, H, W), from x (N, C, H, W), t (N,) and labels y (N,)."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction."""


class SizedDenoiser(Denoiser, Protocol):
    """A denoiser that says the shape (C, h, w) of one sample, as those that are read from a file do."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w)."""


class Guidance(Protocol):
    """Calls a denoiser; progress in [0, 1) is the share of the steps already taken."""

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, y: Tensor, progress: float) -> Tensor:
        """The guided prediction, of the shape of the denoiser's own."""


def no_guidance(denoiser: Denoiser, x: Tensor, t: Tensor, y: Tensor, progress: float) -> Tensor:
    """The denoiser's own prediction."""
    return denoiser(x, t, y)


def extrapolate(weak: Tensor, strong: Tensor, scale: float, guided: int) -> Tensor:
    """Weak + scale * (strong - weak) on the first `guided` channels, `strong` on the others."""
    pushed = torch.lerp(weak[:, :guided], strong[:, :guided], scale)
    return torch.cat([pushed, strong[:, guided:]], dim=1) if guided < strong.shape[1] else pushed


def _check_interval(interval: tuple[float, float]) -> None:
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise InputError(f"a guidance interval is two numbers 0 <= start <= stop <= 1, got {low:g} {high:g}")


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """uncond + scale * (cond - uncond). Ho and Salimans 2022, arXiv:2207.12598.

    Args:
        scale: 1 means off, and costs nothing.
        null_label: the label that means "no label", num_classes for DiT.
        channels: how many of the C noise channels are guided; 3 of 4, as the published DiT samples were made. None guides all.
        interval: guide only while start <= progress < stop (Kynkaanniemi et al. 2024, arXiv:2404.07724); outside, one plain call.
    """

    scale: float = 4.0
    null_label: int = 1000
    channels: int | None = 3
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_interval(self.interval)
        if self.channels is not None and self.channels < 1:
            raise InputError(f"guided channels must be at least 1, got {self.channels}")

    def combine(self, cond: Tensor, uncond: Tensor, latent_channels: int) -> Tensor:
        """Guided model output from the two predictions, each (N, C or 2C, H, W)."""
        guided = latent_channels if self.channels is None else min(self.channels, latent_channels)
        return extrapolate(uncond, cond, self.scale, guided)

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, y: Tensor, progress: float) -> Tensor:
        """One call of twice the batch; a plain one where guidance is off."""
        if self.scale == 1 or not self.interval[0] <= progress < self.interval[1]:
            return denoiser(x, t, y)
        null = torch.full_like(y, self.null_label)
        cond, uncond = denoiser(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
        return self.combine(cond, uncond, x.shape[1])


@dataclass(frozen=True)
class AutoGuidance:
    """weak + scale * (strong - weak), where `weak` is a smaller model with the same label. Karras et al. 2024, arXiv:2406.02507.

    In a stitched run the small denoiser is loaded anyway; both calls have the plain batch, so a step costs T_strong + T_weak.
    """

    weak: Denoiser
    scale: float = 2.0
    channels: int | None = None
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_interval(self.interval)

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, y: Tensor, progress: float) -> Tensor:
        """One call of each model; a plain one where guidance is off, or of the weak model itself."""
        if self.scale == 1 or denoiser is self.weak or not self.interval[0] <= progress < self.interval[1]:
            return denoiser(x, t, y)
        guided = x.shape[1] if self.channels is None else min(self.channels, x.shape[1])
        return extrapolate(self.weak(x, t, y), denoiser(x, t, y), self.scale, guided)
