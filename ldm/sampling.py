"""LDM's beta schedule and timestep grid as a process that `tstitch.solvers` walk, and what its published sampler does otherwise than DiT's.

The sampler visits the timesteps 1, 1 + c, 1 + 2c, ... with c = 1000 // steps and ends at alpha_bar of timestep 0, not at clean data. Data at t = 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.denoiser import LatentDenoiser
from tstitch.diffusion import GaussianDiffusion, named_betas
from tstitch.errors import InputError
from tstitch.guidance import Denoiser
from tstitch.noise import SampleNoise
from tstitch.sampling import Noise
from tstitch.schedule import StitchSchedule
from tstitch.solvers import PLMS, Solver
from tstitch.sweep import UNMEASURED
from tstitch.walker import Guidances, OnEvaluation, SolverWalker, Walked

__all__ = ["PLMS", "RandomUncondWalker", "ddim_timesteps", "draw_unconditional", "ldm_betas", "ldm_diffusion", "published_schedule"]

_UNCOND_STEP = 2**62  # a step of the noise that no solver reaches


def ldm_betas(schedule: str = "linear", timesteps: int = 1000, linear_start: float = 0.0015, linear_end: float = 0.0195) -> np.ndarray:
    """Betas, float64 (timesteps,), ascending in t.

    "linear" is linear in sqrt(beta), "sqrt_linear" in beta, "sqrt" in beta ** 2, as LDM names them; "cosine": Nichol and Dhariwal 2021,
    arXiv:2102.09672, Eq. 17.

    Raises:
        InputError: if the name is unknown.
    """
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=np.float64) ** 2
    if schedule == "cosine":
        return named_betas("squaredcos_cap_v2", timesteps)
    if schedule in ("sqrt_linear", "sqrt"):
        return np.linspace(linear_start, linear_end, timesteps, dtype=np.float64) ** (0.5 if schedule == "sqrt" else 1)
    raise InputError(f"unknown beta schedule '{schedule}'; choose from linear, cosine, sqrt_linear, sqrt")


def ddim_timesteps(num_steps: int, timesteps: int = 1000, spacing: str = "uniform") -> list[int]:
    """Training timesteps that LDM's samplers visit, ascending.

    "uniform" has the stride timesteps // num_steps, so that a number that divides no 1000 gives more steps than asked for: 7 gives 8. The published grid
    starts at 1 and may end at 1000, where it fails; that timestep does not exist and is left out. "quad" is denser at the data and may repeat timesteps.

    Raises:
        InputError: if there are fewer than one or more than `timesteps` steps, or the spacing is unknown.
    """
    if not 1 <= num_steps <= timesteps:
        raise InputError(f"the number of sampling steps must lie in 1..{timesteps}, got {num_steps}")
    if spacing == "uniform":
        grid = np.arange(0, timesteps, timesteps // num_steps)
    elif spacing == "quad":
        grid = (np.linspace(0, np.sqrt(timesteps * 0.8), num_steps) ** 2).astype(int)
    else:
        raise InputError(f"unknown spacing '{spacing}'; choose from uniform, quad")
    return [int(t) + 1 for t in grid if t + 1 < timesteps]


def ldm_diffusion(
    num_steps: int | None, linear_start: float = 0.0015, linear_end: float = 0.0195, timesteps: int = 1000, beta_schedule: str = "linear",
    spacing: str = "uniform",
) -> GaussianDiffusion:  # fmt: skip
    """Make LDM's process for sampling, or with num_steps None the whole one that is trained on; the model predicts eps and no variance.

    Args:
        num_steps: sampling steps that are asked for; see `ddim_timesteps` for how many there are.
        linear_start: first beta, as in the yaml.
        linear_end: last beta.
        timesteps: length of the training process.

    Raises:
        InputError: as `ddim_timesteps` and `ldm_betas`.
    """
    betas = ldm_betas(beta_schedule, timesteps, linear_start, linear_end)
    if num_steps is None:
        return GaussianDiffusion(betas, learn_sigma=False)
    # The published sampler reads alpha_bar from a float32 buffer.
    alphas_cumprod = np.cumprod(1 - betas).astype(np.float32).astype(np.float64)
    betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    kept = ddim_timesteps(num_steps, timesteps, spacing)
    return GaussianDiffusion(betas, kept, learn_sigma=False, final_alpha_cumprod=float(alphas_cumprod[0]))


def published_schedule(ratio: float, solver: Solver, timesteps: int = 1000) -> StitchSchedule:
    """The hand-over of the published LDM scripts, as a schedule of steps: small while t / timesteps > 1 - ratio, and always at ratio 1.

    It differs from `StitchSchedule.from_ratio(ratio)` by a step where the number of steps divides no 1000. The reference compares in float32.
    """
    threshold = np.float32(StitchSchedule.from_ratio(ratio).fractions[1])
    small = sum(ratio == 1 or np.float32(t) / np.float32(timesteps) > threshold for t in solver.timesteps)
    return StitchSchedule.from_ratio(small / solver.num_steps)


def draw_unconditional(noise: Noise, num_samples: int, width: int) -> Tensor:
    """Unconditional contexts as the published scripts draw them, uniform in [0, 1), here each from its sample's own seed; float32 (num_samples, 1, width).

    Args:
        noise: `tstitch.noise.SampleNoise` of the samples.
    """
    # The distribution function of a normal number is uniform.
    return torch.special.ndtr(noise(_UNCOND_STEP, torch.empty(num_samples, 1, width)))


@dataclass(frozen=True)
class RandomUncondWalker(SolverWalker):
    """Walks with a random unconditional context for each sample and denoiser, as the published scripts do with models that learned no null label."""

    @property
    def settings(self) -> dict[str, object]:
        """Those of the solver, and the kind of unconditional context."""
        return super().settings | {"uncond": "random"}

    def walk(
        self, denoisers: Sequence[LatentDenoiser], x_T: Tensor, y: Tensor, *, schedules: Sequence[StitchSchedule], guidance: Guidances, noise: Noise | None,
        max_batch: int | None = None, callback: OnEvaluation | None = None,
    ) -> Walked:  # fmt: skip
        """See `tstitch.sweep.sample_many`. At most max_batch samples are walked together, since a row finds its own context only in whole batches."""
        max_batch = max_batch or UNMEASURED
        walked, parts = [], torch.arange(len(x_T)).split(max_batch)
        for rows in parts:
            share = len(rows) / len(x_T)
            told = None if callback is None else lambda denoiser, evaluations, share=share: callback(denoiser, evaluations * share)
            with _drawn_for(denoisers, noise, rows, x_T.device) as own:
                whole = max(1, max_batch // len(rows)) * len(rows)
                walked.append(
                    super().walk(denoisers, x_T[rows], y[rows], schedules=schedules, guidance=guidance, noise=own, max_batch=whole, callback=told)
                )  # fmt: skip
        latents = [torch.cat(each) for each in zip(*(part.latents for part in walked), strict=True)]
        return Walked(latents, walked[0].evaluations, walked[0].max_batch)

    def evaluation_seconds(
        self, denoisers: Sequence[Denoiser], x: Tensor, y: Tensor, *, guidance: Guidances, noise: Noise | None, repeats: int = 7
    ) -> list[float]:
        """See `tstitch.tune.measure_step_seconds`."""
        with _drawn_for(denoisers, noise, torch.arange(len(x)), x.device) as own:
            return super().evaluation_seconds(denoisers, x, y, guidance=guidance, noise=own, repeats=repeats)


@contextmanager
def _drawn_for(denoisers: Sequence[LatentDenoiser], noise: Noise | None, rows: Tensor, device: torch.device) -> Iterator[SampleNoise]:
    """Give each denoiser the random contexts of some samples inside a with block, which gets the noise of these samples; nothing stays behind."""
    if not isinstance(noise, SampleNoise):
        raise ValueError("random unconditional contexts are drawn from the samples' seeds; pass noise=tstitch.noise.SampleNoise(seeds)")
    own = SampleNoise([noise.seeds[row] for row in rows.tolist()])
    before = [denoiser.unconditional for denoiser in denoisers]
    for denoiser in denoisers:
        denoiser.unconditional = draw_unconditional(own, len(rows), denoiser.context_dim).to(device)
    try:
        yield own
    finally:
        for denoiser, contexts in zip(denoisers, before, strict=True):
            denoiser.unconditional = contexts
