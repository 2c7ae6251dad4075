"""Pictures in class folders, cropped as the ImageNet models were trained."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tstitch.checkpoints import first_line
from tstitch.errors import InputError

PICTURE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))


class DamagedPictureError(InputError):
    """A picture that cannot be decoded; the message names it."""


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """Scale a picture to a short side of `size` and cut the middle square out, as ADM did for its ImageNet models.

    Halving by a box filter first keeps the bicubic step, which looks at few pixels, from aliasing.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in RGB: what is transparent lies on white, 16 bits become 8."""
    if picture.mode.startswith("I;16"):  # Pillow would clip at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


class ImageFolder:
    """Pictures in one folder a class; classes and pictures sorted by name, so that item i is the same picture on every machine.

    `names` are the files relative to `path`, `labels` (N,) int64, `class_names` the folders; `hash` tells two lists of names apart.

    Raises:
        InputError: if there are no class folders, or one of them has no pictures.
    """

    def __init__(self, path: Path, image_size: int) -> None:
        if not path.is_dir():
            raise InputError(f"no folder {path}; pass one that holds a folder of pictures for each class")
        self.path, self.image_size = path, image_size
        self.class_names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not self.class_names:
            raise InputError(f"{path} holds no class folders; put the pictures of each class into a folder of its own")
        self.names: list[str] = []
        sizes = []
        for name in self.class_names:
            files = self._pictures(path / name)
            if not files:
                raise InputError(f"{path / name} holds no pictures ({' '.join(sorted(PICTURE_SUFFIXES))}); remove it or fill it")
            self.names += files
            sizes.append(len(files))
        self.labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self.num_classes = len(self.class_names)
        self.hash = hashlib.sha256("\n".join(self.names).encode()).hexdigest()[:16]

    def _pictures(self, folder: Path) -> list[str]:
        return sorted(
            Path(inside, file).relative_to(self.path).as_posix()
            for inside, _, files in os.walk(folder, followlinks=True)
            for file in files
            if Path(file).suffix.lower() in PICTURE_SUFFIXES and not file.startswith(".")
        )

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int, mirror: bool = False) -> Tensor:
        """Picture i, cropped and perhaps mirrored: uint8 (3, image_size, image_size). Transparent parts become white.

        Raises:
            DamagedPictureError: if it cannot be decoded.
        """
        try:
            with Image.open(self.path / self.names[i]) as picture:
                pixels = np.array(center_crop(to_rgb(picture), self.image_size))
        except Exception as error:  # decoders raise errors of every kind on damaged files
            raise DamagedPictureError(f"{self.names[i]} cannot be decoded ({first_line(error)}); mend it, or extract features with --skip-bad") from None
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        return image.flip(-1) if mirror else image.contiguous()
