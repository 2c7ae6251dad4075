"""FD-emoji: the Frechet distance in the features of a small network that knows emoji drawings.

It is comparable only with itself: not with FID, nor with a value made by another network or another reference.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor, nn

from tstitch.checkpoints import load_strict, read_weights
from tstitch.errors import InputError
from tstitch.metrics.frechet import FeatureStatistics, frechet_distance


class _Residual(nn.Module):
    """Halve the resolution, then one residual convolution."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.down(x)))
        return x + F.silu(self.norm2(self.conv(x)))


class EmojiFeatures(nn.Module):
    """Classifier of category (9) and drawing set (2); its penultimate layer gives 128 features."""

    dim = 128

    def __init__(self, num_classes: int = 9, num_sets: int = 2) -> None:
        super().__init__()
        self.config = {"num_classes": num_classes, "num_sets": num_sets}
        self.blocks = nn.Sequential(_Residual(3, 32), _Residual(32, 64), _Residual(64, 128), _Residual(128, self.dim))
        self.category, self.drawing_set = nn.Linear(self.dim, num_classes), nn.Linear(self.dim, num_sets)

    def features(self, images: Tensor) -> Tensor:
        """Features (N, 128) of uint8 pictures (N, 3, 64, 64)."""
        return self.blocks(images.float() / 127.5 - 1).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the category (N, 9) and of the drawing set (N, 2)."""
        features = self.features(images)
        return self.category(features), self.drawing_set(features)


def load_extractor(folder: Path, device: torch.device | str = "cpu") -> EmojiFeatures:
    """Load folder/features.safetensors in eval mode."""
    state, config = read_weights(folder / "features.safetensors")
    if set(config) != {"num_classes", "num_sets"}:
        raise InputError(f"{folder / 'features.safetensors'} is no emoji feature network; restore the folder pretrained_models/emoji")
    network = EmojiFeatures(**config)
    load_strict(network, state, folder / "features.safetensors")
    return network.to(device).eval()


@torch.no_grad()
def gather(network: EmojiFeatures, images: Tensor, weights: Tensor | None = None, into: FeatureStatistics | None = None) -> FeatureStatistics:
    """Gather feature statistics of uint8 pictures (N, 3, 64, 64), perhaps on top of those gathered before; weights (N,), default 1 each."""
    gathered = FeatureStatistics(network.dim) if into is None else into
    device = network.category.weight.device
    for index in torch.arange(len(images)).split(256):
        gathered.update(network.features(images[index].to(device)), None if weights is None else weights[index])
    return gathered


def load_reference(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean (128,) and covariance (128, 128) of the "train" and the "held_out" drawings, every class with the same weight.

    Raises:
        InputError: if the file is missing.
    """
    path = folder / "reference.safetensors"
    if not path.is_file():
        raise InputError(f"no reference statistics at {path}; restore the folder pretrained_models/emoji")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); restore the folder pretrained_models/emoji") from None
    return {name: (tensors[f"{name}.mu"], tensors[f"{name}.sigma"]) for name in ("train", "held_out")}


def fd_emoji(statistics: FeatureStatistics, reference: tuple[np.ndarray, np.ndarray]) -> float:
    """FD-emoji of gathered statistics to a reference."""
    return frechet_distance(statistics.mean, statistics.covariance, *reference)
