"""A model of one process as a model of another: a DiT, or a SiT of another path, in a flow.

Two Gaussian processes see the same pictures at equal ratios alpha / sigma, one scaled against the other. So a model can be asked at its own time and
scale, its answer read as a guess of the noise and of the clean data, and the flow's velocity put together from the two. Karras et al. 2022,
arXiv:2206.00364, Section 3; Ma et al. 2024, arXiv:2401.08740, Section 2.2.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sit.transport import Transport
from sit.transport.path import VP, expand
from tstitch.diffusion import create_diffusion
from tstitch.guidance import Denoiser


class Place(NamedTuple):
    """A time of a process, as its model is told it, and its shares of data and noise; each (N,)."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor


class Process(Protocol):
    """What a model was trained on."""

    def place(self, log_ratio: Tensor) -> Place:
        """Where log(alpha / sigma) (N,) has this value, or at the nearest time that the model knows."""

    def noise(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Noise that an output stands for, like x (N, C, H, W)."""


class Diffusion:
    """The process of DiT: noise prediction on 1000 linear betas; between two timesteps the log-ratio is interpolated."""

    def __init__(self) -> None:
        alphas_cumprod = create_diffusion("").alphas_cumprod
        self.log_ratios = torch.from_numpy(np.log(alphas_cumprod / (1 - alphas_cumprod)) / 2).float()  # falls with the timestep

    def place(self, log_ratio: Tensor) -> Place:
        """Timesteps 0..999, fractions among them, which a DiT takes as it takes whole ones."""
        self.log_ratios = self.log_ratios.to(log_ratio.device)  # once: a copy in each evaluation would stall a GPU
        table = self.log_ratios.flip(0)  # rises
        value = log_ratio.float().clamp(table[0], table[-1])
        above = torch.searchsorted(table, value).clamp(1, len(table) - 1)
        fraction = (value - table[above - 1]) / (table[above] - table[above - 1])
        t = len(table) - 1 - (above - 1 + fraction)
        return Place(t.to(log_ratio), torch.sigmoid(2 * value).sqrt().to(log_ratio), torch.sigmoid(-2 * value).sqrt().to(log_ratio))

    def noise(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The first C channels of 2C."""
        return output[:, : x.shape[1]]


class Flow:
    """The process of a SiT, kept from the ends of [0, 1] by a thousandth, where log-ratios are infinite."""

    margin = 1e-3

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def place(self, log_ratio: Tensor) -> Place:
        """Times in [margin, 1 - margin]."""
        t = self._time(log_ratio).clamp(self.margin, 1 - self.margin)
        return Place(t, self.transport.path.alpha(t), self.transport.path.sigma(t))

    def _time(self, log_ratio: Tensor) -> Tensor:
        if self.transport.name == "Linear":
            return torch.sigmoid(log_ratio)
        if self.transport.name == "GVP":
            return 2 / math.pi * torch.atan(log_ratio.exp())
        # VP: log alpha = -(b1 - b0) / 4 u^2 - b0 / 2 u with u = 1 - t, a quadratic equation.
        log_alpha = torch.nn.functional.logsigmoid(2 * log_ratio) / 2
        a, b = (VP.b1 - VP.b0) / 4, VP.b0 / 2
        return 1 - (torch.sqrt(b**2 - 4 * a * log_alpha) - b) / (2 * a)

    def noise(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """By the transport's prediction."""
        return self.transport.noise(output, x, t)


class Bridge:
    """A model of `process`, called as the flow `transport` calls its own: bridge(x, t, y) -> what a model of that flow predicts.

    Guidance may be applied to the answer: it is affine in the model's output, with coefficients that do not depend on the label.
    """

    margin = 1e-4

    def __init__(self, model: Denoiser, process: Process, transport: Transport) -> None:
        self.model, self.process, self.transport = model, process, transport
        self.latent_shape, self.parameter_count = model.latent_shape, getattr(model, "parameter_count", None)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        path = self.transport.path
        t = t.clamp(self.margin, 1 - self.margin)  # at the ends noise levels, or their derivatives, may be infinite
        alpha, sigma = path.alpha(t), path.sigma(t)
        there = self.process.place(alpha.log() - sigma.log())
        # Equal where the ratios agree; past the ends of what the model knows, its own scale counts.
        scaled = x * expand(torch.hypot(there.alpha, there.sigma) / torch.hypot(alpha, sigma), x)
        noise = self.process.noise(self.model(scaled, there.t, y), scaled, there.t)
        data = (scaled - expand(there.sigma, x) * noise) / expand(there.alpha, x)
        velocity = expand(path.d_alpha(t), x) * data + expand(path.d_sigma(t), x) * noise
        return self.transport.output(velocity, x, t)
