"""Training features: one folder of memory-mapped arrays, addressed by dataset index.

    index.json   count, latent shape, mirror images, the VAE's name and scaling factor
    moments.npy  float16 (count, mirrors, 2C, H, W): mean and log variance of the VAE's posterior
    labels.npy   int64 (count,)

Moments instead of one frozen draw: every epoch draws its own latents, and a flip when both mirror images are stored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tstitch.errors import InputError
from tstitch.files import atomic_path, read_json, write_json


def class_weights(labels: Tensor, power: float) -> Tensor:
    """Sampling weight of each item, 1 / (size of its class) ** power: 0 draws items evenly, 1 draws classes evenly."""
    return (1.0 / labels.bincount().clamp(min=1).float() ** power)[labels]


def write_features(folder: Path, moments: np.ndarray, labels: np.ndarray, *, num_classes: int, vae: str, scaling_factor: float) -> None:
    """Write a feature folder; the index comes last, so a folder without it is unfinished.

    Args:
        moments: (count, mirrors, 2C, H, W), mean and log variance.
        labels: (count,) in 0..num_classes-1.
    """
    (folder / "index.json").unlink(missing_ok=True)
    for name, array in (("moments", moments.astype(np.float16)), ("labels", labels.astype(np.int64))):
        with atomic_path(folder / f"{name}.npy") as temporary:
            np.save(temporary, array)
    count, mirrors, channels, height, width = moments.shape
    write_json(folder / "index.json", {
        "count": count, "mirrors": mirrors, "latent_shape": [channels // 2, height, width], "num_classes": num_classes,
        "vae": vae, "scaling_factor": scaling_factor,
    })  # fmt: skip


class FeatureStore:
    """A feature folder opened for training.

    Raises:
        InputError: if the folder is unfinished or its arrays contradict its index.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "index.json").exists():
            raise InputError(f"no features at {folder} (index.json is missing); extract them first")
        self.index = read_json(folder / "index.json")
        try:
            self.moments = np.load(folder / "moments.npy", mmap_mode="r")
            self.labels = torch.from_numpy(np.load(folder / "labels.npy"))
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"the features at {folder} are damaged ({error}); extract them again") from None
        if not len(self.moments) == len(self.labels) == self.index["count"]:
            raise InputError(f"{folder} holds {len(self.moments)} features and {len(self.labels)} labels, its index says {self.index['count']}; extract again")
        self.latent_shape = tuple(self.index["latent_shape"])
        self.num_classes = self.index["num_classes"]

    def __len__(self) -> int:
        return self.index["count"]

    def latents(self, index: Tensor) -> Tensor:
        """Draw scaled latents (N, C, H, W), float32, for items (N,): posterior noise and mirror come from torch's global generator."""
        mirror = torch.randint(self.index["mirrors"], index.shape)
        moments = torch.from_numpy(self.moments[index.numpy(), mirror.numpy()]).float()
        mean, log_variance = moments.chunk(2, dim=1)
        return (mean + (0.5 * log_variance).exp() * torch.randn_like(mean)) * self.index["scaling_factor"]
