"""Feature networks behind one interface: uint8 images in, features out.

    extractor = create_extractor("emoji", device)
    statistics = gather(extractor, images)
    distance = frechet_distance(statistics.mean, statistics.covariance, *load_reference_statistics(extractor))

A metric never asks which network it is; FD, precision and recall work in features of any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tstitch.errors import InputError
from tstitch.metrics.folder import FolderBatch
from tstitch.metrics.frechet import FeatureStatistics
from tstitch.metrics.npz import Batch, Statistics

EXTRACTORS = ("inception", "emoji")


@dataclass(frozen=True)
class ImageFeatures:
    """What one pass over N images gives.

    Attributes:
        pool: (N, dim), for the Frechet distance, precision and recall.
        spatial: (N, spatial_dim), for sFID, or None.
        probs: class probabilities (N, K), for the Inception score, or None.
    """

    pool: Tensor
    spatial: Tensor | None = None
    probs: Tensor | None = None


class Extractor(ABC):
    """A feature network.

    Attributes:
        name: what `create_extractor` knows it by.
        dim, spatial_dim: numbers of features; spatial_dim is 0 where there are none.
        distance: what the Frechet distance in these features is called.
        score: what the Inception score of its class probabilities is called.
        image_size: height and width the images must have, or None for any.
        weights: hash of its weights; two results with different ones cannot be compared.
        device: where its features are.
    """

    name: str
    dim: int
    spatial_dim: int = 0
    distance: str
    score: str
    image_size: int | None = None
    weights: str
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def measure(self, images: Tensor) -> ImageFeatures:
        """All features of uint8 images (N, 3, H, W), which may lie on any device."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, dim) of uint8 images (N, 3, H, W)."""
        return self.measure(images).pool

    def references(self) -> dict[str, Statistics]:
        """Statistics that ship with the network, by name."""
        return {}


def create_extractor(name: str, device: torch.device | str = "cpu", folder: Path | None = None) -> Extractor:
    """Load a feature network.

    Args:
        name: "inception" (FID, sFID, Inception score) or "emoji" (FD-emoji).
        folder: where its weights lie (default: pretrained_models, or its emoji folder).

    Raises:
        InputError: if there is none of that name, or its weights are missing or damaged.
    """
    # Imported here: Inception needs torch-fidelity, which nothing else does.
    if name == "inception":
        from tstitch.metrics.inception import InceptionExtractor

        return InceptionExtractor(device, folder)
    if name == "emoji":
        from tstitch.metrics.emoji import EmojiExtractor

        return EmojiExtractor(device, folder)
    raise InputError(f"unknown extractor '{name}'; choose from {', '.join(EXTRACTORS)}")


def gather(
    extractor: Extractor, images: Tensor, weights: Tensor | None = None, into: FeatureStatistics | None = None, batch_size: int = 256
) -> FeatureStatistics:
    """Gather feature statistics of uint8 images (N, 3, H, W), perhaps on top of those gathered before; weights (N,), default 1 each."""
    gathered = FeatureStatistics(extractor.dim) if into is None else into
    for index in torch.arange(len(images)).split(batch_size):
        gathered.update(extractor(images[index]), None if weights is None else weights[index])
    return gathered


def load_reference_statistics(extractor: Extractor, source: str | Path | None = None, batch_size: int = 64) -> Statistics:
    """Mean (dim,) and covariance (dim, dim) that samples are compared with.

    Args:
        source: an .npz of statistics or of images, or the name of a reference that ships with the extractor (default: its first).

    Raises:
        InputError: if there is none, or it does not fit the extractor.
    """
    shipped = extractor.references()
    if source is None:
        if not shipped:
            raise InputError(f"the extractor {extractor.name} comes with no reference; pass an .npz of images or statistics")
        source = next(iter(shipped))
    if str(source) in shipped:
        return shipped[str(source)]
    batch = open_batch(source, extractor)
    if batch.pooled:
        return batch.pooled
    statistics = FeatureStatistics(extractor.dim)
    for images in tqdm(batch.images(batch_size), total=-(-len(batch) // batch_size), desc=batch.path.name, unit="batch"):
        statistics.update(extractor(images))
    return statistics.mean, statistics.covariance


def open_batch(path: str | Path, extractor: Extractor, image_size: int | None = None) -> Batch:
    """Open an .npz, or a folder of class folders, for an extractor.

    Statistics of another network are left aside where there are images to compute them from.

    Args:
        image_size: what the pictures of a folder are scaled and cropped to (default: what the extractor knows).

    Raises:
        InputError: if neither its statistics nor its images fit the extractor.
    """
    if Path(path).is_dir():
        image_size = image_size or extractor.image_size
        if image_size is None:
            raise InputError(f"the size for the pictures of {path} is that of the samples' images; pass SAMPLES that hold images")
        batch: Batch = FolderBatch(Path(path), image_size)
    else:
        batch = Batch(path)
    if batch.pooled and len(batch.pooled[0]) != extractor.dim:
        if batch.shape is None:
            raise InputError(f"{path} holds statistics of {len(batch.pooled[0])} features, the extractor {extractor.name} has {extractor.dim}; choose another")
        batch.pooled = batch.spatial = None
    if batch.spatial and len(batch.spatial[0]) != extractor.spatial_dim:
        batch.spatial = None
    size = extractor.image_size
    if batch.shape and size and batch.shape[1:3] != (size, size):
        raise InputError(
            f"the extractor {extractor.name} knows {size}x{size} images, not the {batch.shape[1]}x{batch.shape[2]} of {path}; use --extractor inception"
        )
    return batch
