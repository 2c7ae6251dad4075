"""The scalable interpolant transformer: Ma et al. 2024, "SiT", arXiv:2401.08740.

A SiT is a DiT under another process: the same network and state-dict keys, told a continuous time in [0, 1] instead of a timestep in 0..999. t = 0 is
noise, t = 1 is data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from dit.models import DiT, DiT_models


class SiT(DiT):
    """Class-conditional model of a flow; the arguments are those of `dit.models.DiT`.

    With learn_sigma, as published, the last layer has twice the channels and only the first half is used.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  (the arguments of DiT)
        super().__init__(*args, **kwargs)
        self.returned_channels = self.in_channels

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict velocity, score or noise, whichever it was trained for.

        Args:
            x: latents (N, C, H, W); computed in the type of the weights, returned in the type of x.
            t: time (N,) in [0, 1], not scaled.
            y: labels (N,), 0..num_classes, where num_classes is the null label.

        Returns:
            (N, C, H, W).
        """
        return super().forward(x, t, y)[:, : self.returned_channels]


SiT_models: dict[str, Callable[..., SiT]] = {name.replace("DiT", "SiT"): partial(SiT, **build.keywords) for name, build in DiT_models.items()}
