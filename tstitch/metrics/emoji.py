"""FD-emoji and IS-emoji: Frechet distance and Inception score by a small network that knows emoji drawings.

They are comparable only with themselves: not with FID, nor with a value made by another network or another reference. IS-emoji lies in 1..9, the
number of categories.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor, nn

from tstitch.checkpoints import file_hash, load_strict, read_weights
from tstitch.errors import InputError
from tstitch.metrics.extractors import Extractor, ImageFeatures
from tstitch.metrics.npz import Statistics
from tstitch.presets import ROOT


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


class EmojiExtractor(Extractor):
    """The network of folder/features.safetensors, with the references of folder/reference.safetensors: "train" and "held_out" drawings."""

    name, dim, distance, score, image_size = "emoji", EmojiFeatures.dim, "fd_emoji", "is_emoji", 64

    def __init__(self, device: torch.device | str = "cpu", folder: Path | None = None) -> None:
        self.folder = folder or ROOT / "pretrained_models" / "emoji"
        self.device = torch.device(device)
        path = self.folder / "features.safetensors"
        state, config = read_weights(path)
        if set(config) != {"num_classes", "num_sets"}:
            raise InputError(f"{path} is no emoji feature network; restore the folder pretrained_models/emoji")
        network = EmojiFeatures(**config)
        load_strict(network, state, path)
        self.network = network.to(self.device).eval()
        self.weights = file_hash(path)

    @torch.no_grad()
    def measure(self, images: Tensor) -> ImageFeatures:
        """Features (N, 128) and category probabilities (N, 9) of uint8 pictures (N, 3, 64, 64)."""
        pool = self.network.features(images.to(self.device))
        return ImageFeatures(pool, probs=self.network.category(pool).softmax(dim=1))

    def references(self) -> dict[str, Statistics]:
        """Statistics of the "train" and the "held_out" drawings, every class with the same weight.

        Raises:
            InputError: if the file is missing or damaged.
        """
        path = self.folder / "reference.safetensors"
        if not path.is_file():
            raise InputError(f"no reference statistics at {path}; restore the folder pretrained_models/emoji")
        try:
            tensors = load_file(path)
            return {name: (tensors[f"{name}.mu"], tensors[f"{name}.sigma"]) for name in ("train", "held_out")}
        except (SafetensorError, OSError, KeyError) as error:
            raise InputError(f"{path} is damaged ({error}); restore the folder pretrained_models/emoji") from None
