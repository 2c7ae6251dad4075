"""Flows of Gaussian data, of which everything is known.

For data x_1 ~ N(MEAN, STD^2), x_t ~ N(alpha MEAN, v) with v = alpha^2 STD^2 + sigma^2. All that a model can predict follows from r = (x - alpha MEAN) / v:
score -r, noise sigma r, velocity alpha' (MEAN + alpha STD^2 r) + sigma' sigma r; and the ODE keeps (x - alpha MEAN) / sqrt(v).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sit.transport import PATHS, PREDICTIONS, Sampler, Transport, create_transport

MEAN, STD = 0.3, 0.5
FLOWS = list(itertools.product(PATHS, PREDICTIONS))
each_flow = pytest.mark.parametrize(("path", "prediction"), FLOWS)
TIGHT = {"atol": 1e-10, "rtol": 1e-8}


def gaussian(transport: Transport, prediction: str | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact model of the Gaussian data."""
    path, prediction = transport.path, prediction or transport.prediction

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma, d_alpha = (value(t).view(-1, *[1] * (x.dim() - 1)) for value in (path.alpha, path.sigma, path.d_alpha))
        r = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        if prediction == "score":
            return -r
        if prediction == "noise":
            return sigma * r
        slope = -sigma if transport.name == "Linear" else -alpha * d_alpha  # sigma' sigma; the others keep alpha^2 + sigma^2 = 1
        return d_alpha * (MEAN + alpha * STD**2 * r) + slope * r

    return model


def moments(transport: Transport, t: float) -> tuple[float, float]:
    """Mean and standard deviation of x_t."""
    at = torch.tensor([t], dtype=torch.float64)
    alpha, sigma = transport.path.alpha(at).item(), transport.path.sigma(at).item()
    return alpha * MEAN, math.hypot(alpha * STD, sigma)


def carried(transport: Transport, x: Tensor, start: float, stop: float) -> Tensor:
    """Where the exact ODE takes x."""
    (mean_0, std_0), (mean_1, std_1) = moments(transport, start), moments(transport, stop)
    return mean_1 + std_1 * (x - mean_0) / std_0


def points(n: int = 8) -> Tensor:
    """Places (n, 1) around the data."""
    return torch.linspace(-2, 2, n, dtype=torch.float64).view(n, 1)


def sampler(path: str = "Linear", prediction: str = "velocity", **eps: float) -> Sampler:
    """The sampler of a flow by its names."""
    return Sampler(create_transport(path, prediction, **eps))
