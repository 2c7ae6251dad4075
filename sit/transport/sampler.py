"""The samplers as users of SiT know them: each gives a function of (x, model, **model_kwargs)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sit.transport.ode import ODE
from sit.transport.sde import SDE, Noise
from sit.transport.transport import Model, Transport

Probe = Callable[[int, Tensor], Tensor]  # probe(k, like): values of mean 0 and covariance 1 for evaluation k


class Sampler:
    """Samples and likelihoods of models of one transport; models are called as model(x, t, **model_kwargs) with x (N, ...), t (N,)."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def sample_ode(
        self, sampling_method: str = "dopri5", num_steps: int = 50, atol: float = 1e-6, rtol: float = 1e-3, reverse: bool = False
    ) -> Callable[..., Tensor]:
        """Deterministic sampling; the arguments are those of `ODE`.

        Returns:
            fn(x, model, **model_kwargs) -> states (num_steps, N, ...); the last one is the sample (the noise, with reverse).
        """
        ode = ODE(self.transport, sampling_method, num_steps, atol, rtol, reverse)

        @torch.no_grad()
        def walk(x: Tensor, model: Model, **model_kwargs: Tensor) -> Tensor:
            return torch.stack([x, *ode.states(ode.drift(model, **model_kwargs), x, ode.grid)])

        return walk

    def sample_sde(
        self, sampling_method: str = "Euler", diffusion_form: str = "SBDM", diffusion_norm: float = 1.0, last_step: str | None = "Mean",
        last_step_size: float = 0.04, num_steps: int = 250, noise: Noise | None = None,
    ) -> Callable[..., list[Tensor]]:  # fmt: skip
        """Stochastic sampling; the arguments are those of `SDE`.

        Args:
            noise: noise(i, like) for step i, such as `tstitch.noise.SampleNoise`; None draws from torch's generator.

        Returns:
            fn(x, model, **model_kwargs) -> the num_steps states after the first; the last one is the sample.
        """
        sde = SDE(self.transport, sampling_method, diffusion_form, diffusion_norm, last_step, last_step_size, num_steps)

        @torch.no_grad()
        def walk(x: Tensor, model: Model, **model_kwargs: Tensor) -> list[Tensor]:
            states = []
            for i in range(num_steps - 1):
                x = sde.step(model, x, i, torch.randn_like(x) if noise is None else noise(i, x), **model_kwargs)
                states.append(x)
            return [*states, sde.finish(model, x, **model_kwargs)]

        return walk

    def sample_ode_likelihood(
        self, sampling_method: str = "dopri5", num_steps: int = 50, atol: float = 1e-6, rtol: float = 1e-3, probe: Probe | None = None
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """Log-density of data, by the change of variables along the ODE from data to noise.

        Grathwohl et al. 2019, "FFJORD", arXiv:1810.01367: log p(x) = log N(z) + integral of div v dt from 1 to 0, the divergence estimated with random probes
        (Hutchinson) as e . d(v . e)/dx.

        Args:
            probe: probe(k, like) for the k-th evaluation. None draws signs: anew at every evaluation of a fixed-step method, whose errors then average
                out; once for an adaptive method, which would take changing signs for a rough function and shorten its steps.

        Returns:
            fn(x, model, **model_kwargs) -> (log p(x) in nats (N,), z like x).
        """
        ode = ODE(self.transport, sampling_method, num_steps, atol, rtol, reverse=True)

        def walk(x: Tensor, model: Model, **model_kwargs: Tensor) -> tuple[Tensor, Tensor]:
            velocity = ode.drift(model, **model_kwargs)
            signs: list[Tensor] = []
            calls = 0

            def draw(like: Tensor) -> Tensor:
                if probe is not None:
                    return probe(calls, like)
                if not (ode.adaptive and signs):
                    signs[:] = [torch.randint_like(like, 2) * 2 - 1]
                return signs[0]

            def drift(t: float | Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                nonlocal calls
                e = draw(state[0])
                calls += 1
                with torch.enable_grad():
                    here = state[0].detach().requires_grad_()
                    v = velocity(t, here)
                    (pulled,) = torch.autograd.grad(v, here, e)
                return v.detach(), (pulled * e).flatten(1).sum(dim=1)

            with torch.no_grad():
                z, change = ode.integrate(drift, (x, x.new_zeros(len(x))), ode.grid)
            prior = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(dim=1)
            return prior + change, z

        return walk
