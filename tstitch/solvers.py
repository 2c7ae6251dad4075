"""Solvers: one small class each that walks from noise to data, one step at a time.

A solver knows its process and nothing of denoisers. `step(x, i, model_output, noise, history)` takes step i (0 is the noisiest) and returns the next x,
the predicted x_0, and the tensors the following step wants to see again. Everything in a step is elementwise over the batch, so samples of different
schedules can share one call. Coefficients are computed on the host in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tstitch.diffusion import GaussianDiffusion
from tstitch.diffusion.process import split_output
from tstitch.errors import InputError


class Step(NamedTuple):
    """Result of one solver step: x and pred_x0 (N, C, H, W), and what the next step needs of this one."""

    x: Tensor
    pred_x0: Tensor
    history: tuple[Tensor, ...] = ()


class Solver(Protocol):
    """What `tstitch.sampling` needs of a solver."""

    num_steps: int
    needs_noise: bool  # False: noise is never drawn
    timesteps: list[int]  # what the model is told at each step, noisiest first
    sigmas: list[float]  # sqrt((1 - alpha_bar) / alpha_bar) at each step, noisiest first

    def step(self, x: Tensor, i: int, model_output: Tensor, noise: Tensor | None = None, history: tuple[Tensor, ...] = ()) -> Step:
        """Take step i, 0 being the noisiest, from x (N, C, H, W); noise is unit noise like x, history what the step before returned."""


class _DiffusionSolver:
    """A solver over the steps of a GaussianDiffusion, from its last index to 0."""

    needs_noise = False

    def __init__(self, diffusion: GaussianDiffusion, clip_denoised: bool = False) -> None:
        self.diffusion, self.clip_denoised = diffusion, clip_denoised
        self.num_steps = diffusion.num_timesteps
        self.timesteps = [int(t) for t in diffusion.timestep_map[::-1]]
        self.sigmas = [float(s) for s in diffusion.sigmas[::-1]]

    def _index(self, i: int) -> int:
        return self.num_steps - 1 - i

    def _pred_x0(self, x: Tensor, i: int, model_output: Tensor) -> Tensor:
        eps, _ = split_output(model_output, x)
        pred_x0 = self.diffusion.pred_x0_from_eps(x, self._index(i), eps)
        return pred_x0.clamp(-1, 1) if self.clip_denoised else pred_x0


def _noise_for(name: str, noise: Tensor | None) -> Tensor:
    if noise is None:
        raise ValueError(f"{name} is stochastic; pass noise=tstitch.noise.SampleNoise(seeds) to sample()")
    return noise


class DDPM(_DiffusionSolver):
    """Ancestral sampling with the process's own variance. Ho et al. 2020, arXiv:2006.11239, Algorithm 2.

    Args:
        diffusion: process whose steps are walked; its learn_sigma says where the variance comes from.
        clip_denoised: clamp the predicted x_0 to [-1, 1], for models of pixels.
    """

    needs_noise = True

    def step(self, x: Tensor, i: int, model_output: Tensor, noise: Tensor | None = None, history: tuple[Tensor, ...] = ()) -> Step:
        """x_{t-1} = mean + sigma * noise; the last step adds none."""
        p = self.diffusion.p_mean_variance(model_output, x, self._index(i), self.clip_denoised)
        if i == self.num_steps - 1:
            return Step(p.mean, p.pred_x0)
        return Step(p.mean + (0.5 * p.log_variance).exp() * _noise_for("DDPM", noise), p.pred_x0)


class DDIM(_DiffusionSolver):
    """Song et al. 2021, "Denoising Diffusion Implicit Models", arXiv:2010.02502, Eqs. 12 and 16.

    Args:
        diffusion: process whose steps are walked.
        eta: 0 is deterministic, 1 has the variance of DDPM.
        clip_denoised: clamp the predicted x_0 to [-1, 1].
    """

    def __init__(self, diffusion: GaussianDiffusion, eta: float = 0.0, clip_denoised: bool = False) -> None:
        super().__init__(diffusion, clip_denoised)
        if not 0 <= eta <= 1:
            raise InputError(f"eta must lie in [0, 1], got {eta:g}")
        self.eta, self.needs_noise = eta, eta > 0

    def step(self, x: Tensor, i: int, model_output: Tensor, noise: Tensor | None = None, history: tuple[Tensor, ...] = ()) -> Step:
        """x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma^2) eps + sigma * noise; a step to clean data, abar_s = 1, has sigma 0."""
        k = self._index(i)
        pred_x0 = self._pred_x0(x, i, model_output)
        eps = self.diffusion.eps_from_pred_x0(x, k, pred_x0)
        abar, abar_next = float(self.diffusion.alphas_cumprod[k]), float(self.diffusion.alphas_cumprod_prev[k])
        sigma = self.eta * math.sqrt((1 - abar_next) / (1 - abar)) * math.sqrt(1 - abar / abar_next)
        x = math.sqrt(abar_next) * pred_x0 + math.sqrt(1 - abar_next - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * _noise_for("DDIM with eta > 0", noise)
        return Step(x, pred_x0)


class DPMSolverPP(_DiffusionSolver):
    """DPM-Solver++(2M). Lu et al. 2022, arXiv:2211.01095, Algorithm 2: second order, one evaluation a step.

    With h the step in lambda = log(alpha / sigma) and D = (1 + h / (2 h_last)) x_0 - h / (2 h_last) x_0_last,
    x_next = (sigma_next / sigma) x - alpha_next (exp(-h) - 1) D. The first and the last step are of first order; the last returns x_0 itself.

    The memory x_0_last is kept when the denoiser changes: it is a prediction of the same clean sample, whoever made it.
    """

    def __init__(self, diffusion: GaussianDiffusion, clip_denoised: bool = False) -> None:
        super().__init__(diffusion, clip_denoised)
        abar = diffusion.alphas_cumprod[::-1]
        self._alpha, self._sigma = np.sqrt(abar), np.sqrt(1 - abar)
        self._lambda = np.log(self._alpha / self._sigma)

    def step(self, x: Tensor, i: int, model_output: Tensor, noise: Tensor | None = None, history: tuple[Tensor, ...] = ()) -> Step:
        """One step of the second-order multistep method."""
        pred_x0 = self._pred_x0(x, i, model_output)
        if i == self.num_steps - 1:
            return Step(pred_x0, pred_x0, (pred_x0,))
        h = self._lambda[i + 1] - self._lambda[i]
        direction = pred_x0
        if i > 0:
            weight = float(h / (2 * (self._lambda[i] - self._lambda[i - 1])))
            direction = (1 + weight) * pred_x0 - weight * history[0]
        x = float(self._sigma[i + 1] / self._sigma[i]) * x - float(self._alpha[i + 1] * np.expm1(-h)) * direction
        return Step(x, pred_x0, (pred_x0,))


class PLMS(_DiffusionSolver):
    """Pseudo linear multistep: a deterministic DDIM step along an eps extrapolated from the last four. Liu et al. 2022, arXiv:2202.09778, Section 3.

    The first step has no memory and is taken twice: evaluation 0 guesses the next x, evaluation 1 starts again with the mean of both eps. So N steps of
    the process are N + 1 evaluations of the model, and those are what `num_steps` and `step(i)` count; a schedule's shares are shares of them.

    The memory is kept when the denoiser changes: it holds predictions of the same noise, whoever made them.
    """

    # Weights of the newest eps first, by how many there are: the Adams-Bashforth methods.
    WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        super().__init__(diffusion)
        again = min(1, self.num_steps - 1)
        self.timesteps.insert(1, self.timesteps[again])
        self.sigmas.insert(1, self.sigmas[again])
        self.num_steps += 1

    def step(self, x: Tensor, i: int, model_output: Tensor, noise: Tensor | None = None, history: tuple[Tensor, ...] = ()) -> Step:
        """Evaluation i; the history is the starting x and its eps after evaluation 0, then up to three eps, newest first."""
        eps, _ = split_output(model_output, x)
        if i == 0:
            return self._along(x, 0, eps, (x, eps))
        if i == 1:
            return self._along(history[0], 0, (history[1] + eps) / 2, (history[1],))
        known = (eps, *history)[:4]
        extrapolated = sum((weight * e for weight, e in zip(self.WEIGHTS[len(known) - 1], known, strict=True)), torch.zeros_like(eps))
        return self._along(x, i - 1, extrapolated, known[:3])

    def _along(self, x: Tensor, step: int, eps: Tensor, history: tuple[Tensor, ...]) -> Step:
        k = self.diffusion.num_timesteps - 1 - step
        pred_x0 = self.diffusion.pred_x0_from_eps(x, k, eps)
        abar_next = float(self.diffusion.alphas_cumprod_prev[k])
        return Step(math.sqrt(abar_next) * pred_x0 + math.sqrt(1 - abar_next) * eps, pred_x0, history)


SOLVERS = {"ddpm": DDPM, "ddim": DDIM, "dpm++": DPMSolverPP, "plms": PLMS}


def create_solver(name: str, diffusion: GaussianDiffusion) -> Solver:
    """Make a solver by its command-line name.

    Raises:
        InputError: if the name is unknown.
    """
    if name not in SOLVERS:
        raise InputError(f"unknown solver '{name}'; choose from {', '.join(SOLVERS)}")
    return SOLVERS[name](diffusion)
