"""One side of a comparison, as ADM lays it out: an .npz of images, of statistics, or of both.

Images are read a batch at a time from the zip member, stored or compressed: a file may be larger than memory.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from tstitch.checkpoints import file_hash
from tstitch.errors import InputError
from tstitch.files import atomic_path

Statistics = tuple[np.ndarray, np.ndarray]  # mean (D,), covariance (D, D)
_IMAGES = "arr_0.npy"


class Batch:
    """Images (N, H, W, 3), uint8, under `arr_0`, and statistics under `mu`, `sigma` (pooled features) and `mu_s`, `sigma_s` (spatial features).

    Attributes:
        shape: of the images, or None where there are none.
        pooled, spatial: mean and covariance, or None.

    Raises:
        InputError: if the file is missing, truncated, or holds neither images nor statistics that can be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = set(archive.namelist())
                self.shape = self._image_shape(archive) if _IMAGES in names else None
        except FileNotFoundError:
            raise InputError(f"no file {self.path}; check the path") from None
        except OSError as error:
            raise InputError(f"could not read {self.path} ({error.strerror}); pass an .npz file") from None
        except zipfile.BadZipFile as error:
            raise InputError(f"{self.path} is truncated or no .npz file ({error}); make or fetch it again") from None
        self.pooled = self._statistics("mu", "sigma") if "mu.npy" in names else None
        self.spatial = self._statistics("mu_s", "sigma_s") if "mu_s.npy" in names else None
        if self.shape is None and self.pooled is None:
            raise InputError(f"{self.path} holds neither images (arr_0) nor statistics (mu, sigma), only {sorted(names)}; pass another file")

    def __len__(self) -> int:
        """Number of images."""
        return self.shape[0] if self.shape else 0

    def hash(self) -> str:
        """16 hex digits that tell two files apart."""
        return file_hash(self.path)

    def _image_shape(self, archive: zipfile.ZipFile) -> tuple[int, ...]:
        with archive.open(_IMAGES) as member:
            shape, fortran, dtype = _read_header(member, self.path)
            size = member.tell() + int(np.prod(shape)) * dtype.itemsize
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran:
            order = ", Fortran order" if fortran else ""
            raise InputError(f"arr_0 of {self.path} is {dtype} {list(shape)}{order}; expected uint8 images [N, height, width, 3], as numpy.savez stores them")
        if shape[0] < 2:
            raise InputError(f"{self.path} holds a single image; a covariance needs at least 2")
        if archive.getinfo(_IMAGES).file_size != size:
            raise InputError(f"arr_0 of {self.path} is truncated: {archive.getinfo(_IMAGES).file_size} bytes where its header says {size}; make it again")
        return shape

    def _statistics(self, mean: str, covariance: str) -> Statistics:
        try:
            with np.load(self.path) as archive:
                mu, sigma = (np.asarray(archive[name], dtype=np.float64) for name in (mean, covariance))
        except KeyError:
            raise InputError(f"{self.path} holds {mean} without {covariance}; make it again") from None
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{mean} and {covariance} of {self.path} cannot be read ({error}); make or fetch it again") from None
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise InputError(f"{mean} {list(mu.shape)} and {covariance} {list(sigma.shape)} of {self.path} are no mean and covariance; make it again")
        return mu, sigma

    def images(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        """The images in order, or the first `limit`, as uint8 (n, 3, H, W) with n <= batch_size; one batch is in memory at a time.

        Raises:
            InputError: if the data turn out to be damaged.
        """
        if self.shape is None:
            return
        count, picture = min(len(self), limit or len(self)), int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(_IMAGES) as member:
                _read_header(member, self.path)
                for start in range(0, count, batch_size):
                    rows = min(batch_size, count - start)
                    data = np.frombuffer(bytearray(member.read(rows * picture)), np.uint8)
                    yield torch.from_numpy(data.reshape(rows, *self.shape[1:])).permute(0, 3, 1, 2)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"arr_0 of {self.path} is damaged ({error}); make or fetch it again") from None


def _read_header(member: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(member)
        return {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version](member)
    except (ValueError, KeyError, EOFError, zlib.error) as error:
        raise InputError(f"arr_0 of {path} is no array ({error}); make it again with numpy.savez") from None


def save_statistics(path: Path, pooled: Statistics, spatial: Statistics | None) -> None:
    """Write mu, sigma and, where there are spatial features, mu_s, sigma_s; the file appears whole or not at all."""
    arrays = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), (*pooled, *(spatial or ())), strict=False))
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)
