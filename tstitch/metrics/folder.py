"""One's own pictures as a reference: class folders, as training reads them, in the place of an .npz."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tstitch.errors import InputError
from tstitch.metrics.npz import Batch
from tstitch.pictures import ImageFolder


class FolderBatch(Batch):
    """Pictures of class folders, scaled and cropped to squares of `image_size` pixels as in training; never any statistics.

    Raises:
        InputError: if there are no class folders, or fewer than 2 pictures.
    """

    def __init__(self, path: Path, image_size: int) -> None:
        self.path, self.pictures = path, ImageFolder(path, image_size)
        self.shape = (len(self.pictures), image_size, image_size, 3)
        self.pooled = self.spatial = None
        if len(self.pictures) < 2:
            raise InputError(f"{path} holds a single picture; a covariance needs at least 2")

    def images(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        """The pictures in the order of their names, or the first `limit`, as uint8 (n, 3, image_size, image_size) with n <= batch_size.

        Raises:
            DamagedPictureError: naming a picture that cannot be decoded.
        """
        for items in torch.arange(min(len(self), limit or len(self))).split(batch_size):
            yield torch.stack([self.pictures.image(item) for item in items.tolist()])

    def hash(self) -> str:
        """16 hex digits that tell two folders apart, by names and contents of their pictures."""
        digest = hashlib.sha256(self.pictures.hash.encode())
        for name in self.pictures.names:
            digest.update((self.path / name).read_bytes())
        return digest.hexdigest()[:16]
