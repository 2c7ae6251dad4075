"""What a flow model predicts along an interpolant, how it is trained, and where its time may go.

t = 0 is noise, t = 1 is data. Ma et al. 2024, arXiv:2401.08740, Section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sit.transport.path import PATHS, Path, expand
from tstitch.errors import InputError

PREDICTIONS = ("velocity", "score", "noise")
LOSS_WEIGHTS = ("None", "velocity", "likelihood")

Model = Callable[..., Tensor]  # model(x, t, **model_kwargs): x (N, ...), t (N,)


@dataclass(frozen=True)
class Transport:
    """An interpolant, a prediction and the intervals of time; make it with `create_transport`.

    Args:
        path: the interpolant.
        prediction: "velocity", "score" or "noise".
        loss_weight: weight of score and noise losses: "None" is 1; "velocity" is (g / sigma)^2, the loss of the velocity it implies; "likelihood" is
            g / sigma^2, a bound on the likelihood. A velocity loss is never weighted.
        train_eps, sample_eps: width that is kept from the ends of [0, 1] where something is singular.
    """

    path: Path
    prediction: str
    loss_weight: str
    train_eps: float
    sample_eps: float

    @property
    def name(self) -> str:
        """Name of the interpolant."""
        return type(self.path).__name__

    def interval(
        self, eps: float | None = None, *, sde: bool = False, diffusion_form: str = "SBDM", last_step_size: float = 0.0, reverse: bool = False
    ) -> tuple[float, float]:
        """First and last time of a trajectory, the published ones wherever those are finite.

        Args:
            eps: None is sample_eps.
            last_step_size: of an SDE: its grid ends so much before 1.
            reverse: from data to noise.
        """
        eps = self.sample_eps if eps is None else eps
        start, stop = 0.0, 1.0
        if self.name == "VP":
            stop = 1 - eps
        elif self.prediction != "velocity" or sde:
            start = eps if self.prediction != "velocity" or (sde and diffusion_form == "SBDM") else 0.0
            stop = 1 - eps
        if sde and last_step_size:
            stop = 1 - last_step_size
        if not reverse:
            return start, stop
        if self.name == "VP" and self.prediction == "noise":
            return stop, start  # the published 1 .. eps divides by sigma = 0
        return 1 - start, 1 - stop

    def check_finite(self, start: float, stop: float, *, score: bool = False, diffusion_form: str = "") -> None:
        """Refuse a trajectory that would divide by zero at one of its ends.

        Args:
            start, stop: times of evaluation, in either direction.
            score: the score is needed, not the velocity alone.
            diffusion_form: of an SDE.

        Raises:
            InputError: saying which end, and what to pass.
        """
        at_noise = self.name != "VP" and (self.prediction != "velocity" or diffusion_form == "SBDM")  # r = alpha' / alpha is infinite
        at_data = (score and self.prediction != "score") or (self.name == "VP" and self.prediction == "noise")  # a division by sigma = 0
        for singular, t in ((at_noise, 0.0), (at_data, 1.0)):
            if singular and t in (start, stop):
                what = "SBDM diffusion" if t == 0 and self.prediction == "velocity" else "score" if score and t == 1 else "velocity"
                raise InputError(
                    f"the {what} of {self.name} with {self.prediction} prediction is infinite at t = {t:g}; pass --sample-eps above 0, such as 1e-3"
                    + (", or a --last-step" if score and t == 1 else "")
                )

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity that a model's output stands for, the drift of the probability-flow ODE; x (N, ...), t (N,)."""
        if self.prediction == "velocity":
            return output
        convert = self.path.velocity_from_score if self.prediction == "score" else self.path.velocity_from_noise
        return convert(output, x, t)

    def score(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Score that a model's output stands for."""
        if self.prediction == "score":
            return output
        if self.prediction == "noise":
            return output / -expand(self.path.sigma(t), x)
        return self.path.score_from_velocity(output, x, t)

    def noise(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Noise x_0 that a model's output stands for."""
        if self.prediction == "noise":
            return output
        if self.prediction == "score":
            return output * -expand(self.path.sigma(t), x)
        return self.path.noise_from_velocity(output, x, t)

    def output(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """What a model of this prediction would have said for a velocity; the inverse of `velocity`."""
        if self.prediction == "velocity":
            return velocity
        convert = self.path.score_from_velocity if self.prediction == "score" else self.path.noise_from_velocity
        return convert(velocity, x, t)

    def check_trainable(self) -> None:
        """Refuse to train what is infinite at an end of the training interval.

        Raises:
            InputError: saying what to pass.
        """
        if self.train_eps == 0 and (self.loss_weight != "None" if self.prediction != "velocity" else self.name == "VP"):
            what = f"the {self.prediction} of {self.name}" + (f" with loss weight {self.loss_weight}" if self.prediction != "velocity" else "")
            raise InputError(f"{what} is infinite at the ends of time; train it with --train-eps above 0, such as 1e-3")

    def training_losses(
        self, model: Model, x_1: Tensor, model_kwargs: dict[str, Any] | None = None, x_0: Tensor | None = None, u: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss of each sample.

        Args:
            model: called as model(x_t, t, **model_kwargs).
            x_1: data (N, ...).
            x_0: noise like x_1; None draws it, before u.
            u: uniform in [0, 1), (N,), which places t in the training interval; None draws it.

        Returns:
            "loss" (N,), the mean over everything but the batch, and "pred", the model's output.

        Raises:
            InputError: as `check_trainable`.
        """
        self.check_trainable()
        x_0 = torch.randn_like(x_1) if x_0 is None else x_0
        u = torch.rand(len(x_1), device=x_1.device, dtype=x_1.dtype) if u is None else u
        first, last = self.interval(self.train_eps)
        t = (u * (last - first) + first).to(x_1)
        x_t, velocity = self.path.interpolate(t, x_0, x_1)
        pred = model(x_t, t, **(model_kwargs or {}))
        if self.prediction == "velocity":
            error = pred - velocity
        elif self.prediction == "noise":
            error = pred - x_0
        else:
            error = pred * expand(self.path.sigma(t), x_t) + x_0
        loss = error.square().flatten(1).mean(dim=1)
        return {"loss": loss if self.prediction == "velocity" else loss * self._weight(t), "pred": pred}

    def _weight(self, t: Tensor) -> Tensor:
        if self.loss_weight == "None":
            return torch.ones_like(t)
        gain, sigma = self.path.gain(t), self.path.sigma(t)
        return (gain / sigma) ** 2 if self.loss_weight == "velocity" else gain / sigma**2


def create_transport(
    path_type: str = "Linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
) -> Transport:
    """Make a transport from the words of the published command line.

    Args:
        path_type: Linear, GVP or VP.
        prediction: velocity, score or noise.
        loss_weight: None, "velocity" or "likelihood".
        train_eps, sample_eps: None is the published default: 1e-5 and 1e-3 for VP; 0 for the velocity of Linear and GVP; else 1e-3. Each counts by itself.

    Raises:
        InputError: if a word is unknown or an eps is not in [0, 0.5).
    """
    loss_weight = "None" if loss_weight is None else loss_weight
    for flag, value, known in (("path-type", path_type, PATHS), ("prediction", prediction, PREDICTIONS), ("loss-weight", loss_weight, LOSS_WEIGHTS)):
        if value not in known:
            raise InputError(f"unknown --{flag} '{value}'; choose from {', '.join(known)}")
    for flag, eps in (("train-eps", train_eps), ("sample-eps", sample_eps)):
        if eps is not None and not 0 <= eps < 0.5:
            raise InputError(f"--{flag} must lie in [0, 0.5), got {eps:g}")
    defaults = (1e-5, 1e-3) if path_type == "VP" else (0.0, 0.0) if prediction == "velocity" else (1e-3, 1e-3)
    train_eps = defaults[0] if train_eps is None else train_eps
    sample_eps = defaults[1] if sample_eps is None else sample_eps
    return Transport(PATHS[path_type](), prediction, loss_weight, train_eps, sample_eps)
