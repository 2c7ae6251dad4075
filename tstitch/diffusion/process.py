"""One Gaussian diffusion process: q(x_t | x_0), its posterior, p(x_{t-1} | x_t) from a model's output, losses and bits per dimension.

    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)        Ho et al. 2020, arXiv:2006.11239, Eq. 4

Schedules are float64 numpy arrays, ascending in t; index i is a step of *this* (perhaps respaced) process and timestep_map[i] the training timestep
that the model is told. Data at t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tstitch.diffusion.schedules import named_betas, space_timesteps


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t): mean, log variance and the x_0 they imply, each broadcastable to (N, C, H, W)."""

    mean: Tensor
    log_variance: Tensor
    pred_x0: Tensor


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the batch dimension; (N,)."""
    return x.flatten(1).mean(dim=1)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) for each element, in nats."""
    return 0.5 * (-1.0 + logvar2 - logvar1 + (logvar1 - logvar2).exp() + (mean1 - mean2) ** 2 * (-logvar2).exp())


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability, in nats, of 8-bit values scaled to [-1, 1] under a Gaussian integrated over bins of 2/255; elementwise.

    Ho et al. 2020, arXiv:2006.11239, Eq. 13. The normal CDF is the tanh approximation, because published numbers were made with it.
    """

    def cdf(u: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (u + 0.044715 * u**3)))

    inverse_scale = (-log_scale).exp()
    upper, lower = cdf(inverse_scale * (x - mean + 1 / 255)), cdf(inverse_scale * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


class GaussianDiffusion:
    """A process over the kept timesteps of a longer one; the model predicts eps, and perhaps the variance.

    Args:
        betas: float64 betas of the original process, ascending in t.
        timesteps: original timesteps to keep, ascending; None keeps all.
        learn_sigma: the model's second half of channels interpolates the log variance (Nichol and Dhariwal 2021, Eq. 15).
        sigma_small: without learn_sigma, use the posterior variance instead of beta_t.
        vb_weight: factor on the variational term of the loss; 1 as in DiT.
        mse_in_loss: False trains on the variational bound alone (rescaled KL).
        final_alpha_cumprod: alpha_bar that the last step goes to; 1 is clean data, LDM's sampler stops a little before.
    """

    def __init__(
        self,
        betas: np.ndarray,
        timesteps: list[int] | None = None,
        learn_sigma: bool = True,
        sigma_small: bool = False,
        vb_weight: float = 1.0,
        mse_in_loss: bool = True,
        final_alpha_cumprod: float = 1.0,
    ) -> None:
        kept = list(range(len(betas))) if timesteps is None else sorted(set(timesteps))
        alphas_cumprod = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))[kept]
        self.original_num_steps = len(betas)
        self.timestep_map = np.array(kept)
        self.learn_sigma, self.vb_weight, self.mse_in_loss = learn_sigma, vb_weight, mse_in_loss
        self.alphas_cumprod_prev = np.append(final_alpha_cumprod, alphas_cumprod[:-1])
        self.betas = np.asarray(betas, dtype=np.float64) if timesteps is None else 1 - alphas_cumprod / self.alphas_cumprod_prev
        # Cumulated again from the respaced betas: that is how the published schedules were computed, to the last bit.
        self.alphas_cumprod = final_alpha_cumprod * np.cumprod(1.0 - self.betas)
        self.alphas_cumprod_prev = np.append(final_alpha_cumprod, self.alphas_cumprod[:-1])
        self.num_timesteps = len(kept)

        one_minus = 1.0 - self.alphas_cumprod
        self.posterior_variance = self.betas * (1.0 - self.alphas_cumprod_prev) / one_minus
        # The posterior variance is 0 at t = 0; its log takes the value of the next step instead.
        clipped = np.append(self.posterior_variance[min(1, self.num_timesteps - 1)], self.posterior_variance[1:])
        self.posterior_log_variance_clipped = np.log(np.maximum(clipped, 1e-300))
        self.posterior_mean_coef_x0 = self.betas * np.sqrt(self.alphas_cumprod_prev) / one_minus
        self.posterior_mean_coef_xt = (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / one_minus
        large = np.append(clipped[0], self.betas[1:])
        self.fixed_log_variance = self.posterior_log_variance_clipped if sigma_small else np.log(np.maximum(large, 1e-300))
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

    @property
    def sigmas(self) -> np.ndarray:
        """sqrt((1 - alpha_bar) / alpha_bar), the noise level relative to the signal, ascending in t."""
        return self.sqrt_recipm1_alphas_cumprod

    def model_time(self, i: Tensor) -> Tensor:
        """Training timesteps (N,) of process indices (N,)."""
        return torch.from_numpy(self.timestep_map).to(i.device)[i]

    def q_sample(self, x_0: Tensor, i: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) with the given unit noise (N, C, H, W)."""
        return _at(np.sqrt(self.alphas_cumprod), i, x_0) * x_0 + _at(np.sqrt(1 - self.alphas_cumprod), i, x_0) * noise

    def q_posterior(self, x_0: Tensor, x_t: Tensor, i: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(x_{t-1} | x_t, x_0), Ho et al. 2020, Eq. 7."""
        mean = _at(self.posterior_mean_coef_x0, i, x_t) * x_0 + _at(self.posterior_mean_coef_xt, i, x_t) * x_t
        return mean, _at(self.posterior_log_variance_clipped, i, x_t)

    def pred_x0_from_eps(self, x_t: Tensor, i: Tensor | int, eps: Tensor) -> Tensor:
        """x_0 = sqrt(1 / alpha_bar) x_t - sqrt(1 / alpha_bar - 1) eps."""
        return _at(self.sqrt_recip_alphas_cumprod, i, x_t) * x_t - _at(self.sqrt_recipm1_alphas_cumprod, i, x_t) * eps

    def eps_from_pred_x0(self, x_t: Tensor, i: Tensor | int, x_0: Tensor) -> Tensor:
        """Inverse of pred_x0_from_eps."""
        return (_at(self.sqrt_recip_alphas_cumprod, i, x_t) * x_t - x_0) / _at(self.sqrt_recipm1_alphas_cumprod, i, x_t)

    def p_mean_variance(self, model_output: Tensor, x_t: Tensor, i: Tensor | int, clip_denoised: bool = False) -> Prediction:
        """p(x_{t-1} | x_t) from the model's output.

        Args:
            model_output: (N, 2C, H, W) where the model learned its variance. Of (N, C, H, W) the variance is beta_t, whatever learn_sigma says.
            x_t: (N, C, H, W).
            i: process index, an int or (N,).
            clip_denoised: clamp the predicted x_0 to [-1, 1], for models of pixels.
        """
        eps, values = split_output(model_output, x_t)
        if self.learn_sigma and values is not None:
            share = (values + 1) / 2  # not clamped, as trained
            log_variance = share * _at(np.log(self.betas), i, x_t) + (1 - share) * _at(self.posterior_log_variance_clipped, i, x_t)
        else:
            log_variance = _at(self.fixed_log_variance, i, x_t)
        pred_x0 = self.pred_x0_from_eps(x_t, i, eps)
        if clip_denoised:
            pred_x0 = pred_x0.clamp(-1, 1)
        mean, _ = self.q_posterior(pred_x0, x_t, i)
        return Prediction(mean, log_variance, pred_x0)

    def vb_terms_bpd(self, model_output: Tensor, x_0: Tensor, x_t: Tensor, i: Tensor, clip_denoised: bool = False) -> Tensor:
        """Term L_i of the variational bound in bits per dimension (N,): KL(q posterior || p), at i = 0 the decoder's negative log likelihood."""
        true_mean, true_log_variance = self.q_posterior(x_0, x_t, i)
        p = self.p_mean_variance(model_output, x_t, i, clip_denoised)
        log_variance = p.log_variance.expand_as(x_t)
        kl = mean_flat(normal_kl(true_mean, true_log_variance.expand_as(x_t), p.mean, log_variance)) / math.log(2.0)
        nll = mean_flat(-discretized_gaussian_log_likelihood(x_0, p.mean, 0.5 * log_variance)) / math.log(2.0)
        return torch.where(i == 0, nll, kl)

    def training_losses(
        self, model: Callable[..., Tensor], x_0: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss terms for each sample: Ho et al. 2020, Eq. 14, plus Nichol and Dhariwal 2021, Eq. 16 where the variance is learned.

        Args:
            model: called as model(x_t, training timesteps, **model_kwargs).
            x_0: (N, C, H, W).
            t: process indices (N,) in 0..num_timesteps-1.
            noise: unit noise (N, C, H, W); drawn if None.

        Returns:
            loss = mse + vb, and its parts, each (N,). The variational term does not move the predicted mean: eps is detached in it.
        """
        noise = torch.randn_like(x_0) if noise is None else noise
        x_t = self.q_sample(x_0, t, noise)
        output = model(x_t, self.model_time(t), **(model_kwargs or {}))
        eps, values = split_output(output, x_t)
        terms = {"mse": mean_flat((noise - eps) ** 2)}
        if not self.mse_in_loss:
            terms["vb"] = self.vb_terms_bpd(output, x_0, x_t, t) * self.vb_weight
            terms["loss"] = terms["vb"]
        elif self.learn_sigma and values is not None:
            frozen = torch.cat([eps.detach(), values], dim=1)
            terms["vb"] = self.vb_terms_bpd(frozen, x_0, x_t, t) * self.vb_weight
            terms["loss"] = terms["mse"] + terms["vb"]
        else:
            terms["loss"] = terms["mse"]
        return terms

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Callable[..., Tensor],
        x_0: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Callable[[int, Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Variational bound in bits per dimension, term by term from the noisiest index to 0.

        Args:
            model: called as model(x_t, training timesteps, **model_kwargs).
            x_0: (N, C, H, W) in [-1, 1].
            noise: noise(k, like) for loop iteration k = 0, 1, ...; drawn if None.

        Returns:
            total_bpd (N,), prior_bpd (N,), vb, xstart_mse and mse, each (N, num_timesteps).
        """
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for k, index in enumerate(reversed(range(self.num_timesteps))):
            i = torch.full((len(x_0),), index, device=x_0.device)
            eps = torch.randn_like(x_0) if noise is None else noise(k, x_0)
            x_t = self.q_sample(x_0, i, eps)
            output = model(x_t, self.model_time(i), **(model_kwargs or {}))
            pred_x0 = self.p_mean_variance(output, x_t, i, clip_denoised).pred_x0
            columns["vb"].append(self.vb_terms_bpd(output, x_0, x_t, i, clip_denoised))
            columns["xstart_mse"].append(mean_flat((pred_x0 - x_0) ** 2))
            columns["mse"].append(mean_flat((self.eps_from_pred_x0(x_t, i, pred_x0) - eps) ** 2))
        stacked = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        last = self.alphas_cumprod[-1]
        zero = torch.zeros_like(x_0)
        prior = normal_kl(math.sqrt(last) * x_0, zero + math.log(1.0 - last), zero, zero)
        stacked["prior_bpd"] = mean_flat(prior) / math.log(2.0)
        stacked["total_bpd"] = stacked["vb"].sum(dim=1) + stacked["prior_bpd"]
        return stacked


def split_output(model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split a model's output into eps (N, C, H, W) and its variance channels, None where it has none."""
    channels = x_t.shape[1]
    if model_output.shape[1] == channels:
        return model_output, None
    if model_output.shape[1] == 2 * channels:
        eps, values = model_output.split(channels, dim=1)
        return eps, values
    raise ValueError(f"a model output of {model_output.shape[1]} channels fits neither {channels} (eps) nor {2 * channels} (eps and variance)")


def _at(values: np.ndarray, i: Tensor | int, like: Tensor) -> Tensor:
    """values[i] in like's dtype, shaped to broadcast over (N, C, H, W). An int index stays on the host until the one copy."""
    if isinstance(i, int):
        return torch.tensor(values[i], dtype=like.dtype, device="cpu")  # a 0-dim CPU tensor combines with any device without a sync
    return torch.from_numpy(values).to(like.dtype).to(i.device)[i].view(-1, *[1] * (like.dim() - 1))


def create_diffusion(
    timestep_respacing: str | list[int] | None,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
) -> GaussianDiffusion:
    """Make a process from the words that DiT users know.

    Args:
        timestep_respacing: "" or None for all steps, else see `space_timesteps`: "100", "ddim50", "10,15,20".
        noise_schedule: "linear" or "squaredcos_cap_v2".
        use_kl: train on the variational bound alone, rescaled to the size of the sum over all steps.
        sigma_small: without learn_sigma, the posterior variance instead of beta_t.
        rescale_learned_sigmas: weigh the variational term by (kept steps) / 1000.

    Raises:
        InputError: if the respacing or the schedule is unknown.
    """
    kept = space_timesteps(diffusion_steps, timestep_respacing or "")
    return GaussianDiffusion(
        named_betas(noise_schedule, diffusion_steps),
        kept,
        learn_sigma=learn_sigma,
        sigma_small=sigma_small,
        vb_weight=float(len(kept)) if use_kl else len(kept) / 1000.0 if rescale_learned_sigmas else 1.0,
        mse_in_loss=not use_kl,
    )
