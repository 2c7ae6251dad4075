"""The discrete Gaussian diffusion process: beta schedules, respacing, q and p formulas, training losses. Data at t = 0, noise at t = T - 1."""

from tstitch.diffusion.process import GaussianDiffusion, create_diffusion
from tstitch.diffusion.schedules import named_betas, space_timesteps

__all__ = ["GaussianDiffusion", "create_diffusion", "named_betas", "space_timesteps"]
