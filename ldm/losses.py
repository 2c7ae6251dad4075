"""LDM's training loss: mean error of the predicted eps, with its optional weights.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise
    loss = l_simple_weight mean(l / exp(logvar_t) + logvar_t) + original_elbo_weight mean(lvlb_t l)

where l is the squared or absolute error of a sample, mean over its elements.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tstitch.diffusion import GaussianDiffusion
from tstitch.diffusion.process import mean_flat
from tstitch.errors import InputError
from tstitch.guidance import Denoiser


def lvlb_weights(diffusion: GaussianDiffusion) -> np.ndarray:
    """Weights of the variational bound for eps, float64 (T,): beta^2 / (2 posterior_variance alpha (1 - alpha_bar)).

    Ho et al. 2020, arXiv:2006.11239, Eq. 12. Timestep 0, where the posterior variance is 0, takes the weight of timestep 1.
    """
    denominator = 2 * diffusion.posterior_variance * (1 - diffusion.betas) * (1 - diffusion.alphas_cumprod)
    weights = diffusion.betas[1:] ** 2 / denominator[1:]
    return np.append(weights[0], weights)


def p_losses(
    diffusion: GaussianDiffusion, denoiser: Denoiser, x_0: Tensor, t: Tensor, y: Tensor, noise: Tensor | None = None, loss_type: str = "l2",
    logvar: Tensor | None = None, l_simple_weight: float = 1.0, original_elbo_weight: float = 0.0,
) -> dict[str, Tensor]:  # fmt: skip
    """Loss and its parts.

    Args:
        diffusion: the whole training process, `ldm_diffusion(None)`.
        x_0: scaled latents (N, C, H, W).
        t: timesteps (N,) in 0..T-1.
        y: labels (N,).
        noise: unit noise like x_0; drawn if None.
        loss_type: "l2" or "l1".
        logvar: log variance of the error at each timestep (T,); None is 0.

    Returns:
        loss, loss_simple and loss_vlb, scalars; per_sample (N,), x_noisy and model_output, like x_0.

    Raises:
        InputError: if the loss type is unknown.
    """
    if loss_type not in ("l2", "l1"):
        raise InputError(f"unknown loss type '{loss_type}'; choose from l2, l1")
    noise = torch.randn_like(x_0) if noise is None else noise
    x_t = diffusion.q_sample(x_0, t, noise)
    eps = denoiser(x_t, diffusion.model_time(t), y)
    per_sample = mean_flat((noise - eps) ** 2 if loss_type == "l2" else (noise - eps).abs())
    log_variance = torch.zeros_like(per_sample) if logvar is None else logvar.to(t.device)[t]
    weights = torch.from_numpy(lvlb_weights(diffusion)).to(t.device, per_sample.dtype)[t]
    loss_vlb = (weights * per_sample).mean()
    loss = l_simple_weight * (per_sample / log_variance.exp() + log_variance).mean() + original_elbo_weight * loss_vlb
    return {"loss": loss, "loss_simple": per_sample.mean(), "loss_vlb": loss_vlb, "per_sample": per_sample, "x_noisy": x_t, "model_output": eps}
