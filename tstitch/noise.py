"""Noise as a function of (seed, step).

Sample i has the same noise in any batch, on any number of devices, for any schedule, and after a resume, because nothing it is made of comes from a
shared random stream: the value at (seed, step) is the counter-based generator Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3") with that pair as its key.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tstitch.errors import InputError

_LABEL_STREAM = 2**63  # a key no step reaches


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


class SampleNoise:
    """Noise for a batch of samples, each with its own seed (0 <= seed < 2**64).

    Called as noise(step, like) it returns standard normal values of like's shape, device and dtype, row i from seeds[i]. Step -1 is the initial latent.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        if len(seeds) == 0:
            raise InputError("no seeds given; pass at least one, e.g. --seed 0")
        wrong = next((seed for seed in seeds if not 0 <= seed < 2**64), None)
        if wrong is not None:
            raise InputError(f"seeds must lie in 0..2**64-1, got {wrong}")
        self.seeds = [int(seed) for seed in seeds]

    def __call__(self, step: int, like: Tensor) -> Tensor:
        """Standard normal noise of step -1, 0, 1, ...; `like` is (len(seeds), ...)."""
        if len(like) != len(self.seeds):
            raise ValueError(f"{len(self.seeds)} seeds cannot give noise for a batch of {len(like)}")
        # Drawn on the CPU in float32, so that the numbers do not depend on the device or the number type of the sampler.
        rows = np.stack([_generator(seed, step + 1).standard_normal(tuple(like.shape[1:]), dtype=np.float32) for seed in self.seeds])
        return torch.from_numpy(rows).to(device=like.device, dtype=like.dtype, non_blocking=True)

    def latents(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Initial latents, float32 (len(seeds), *shape), unit variance."""
        return self(-1, torch.empty((len(self.seeds), *shape), device=device))

    def labels(self, num_classes: int) -> Tensor:
        """A label in 0..num_classes-1 for each sample, drawn from its own seed; int64 (len(seeds),)."""
        return torch.tensor([int(_generator(seed, _LABEL_STREAM).integers(num_classes)) for seed in self.seeds])
