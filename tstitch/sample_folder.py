"""The folder that a sweep for FID fills: which chunks are done, and one ADM .npz for each schedule when all are."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tstitch.errors import InputError
from tstitch.files import atomic_path, read_json, write_json
from tstitch.plots import save_image


class SampleFolder:
    """A sweep on disk.

    config.json says what it is. `name`.npz (arr_0, uint8 N x H x W x 3) and `name`.json are a finished schedule. work/ is there until all are finished:
    `name`.u8 has the pictures of a schedule back to back, done/ an empty file for each chunk whose pictures are on disk.
    """

    def __init__(self, folder: Path, names: Sequence[str], count: int, image_size: int, batch: int, png: bool = False) -> None:
        self.folder, self.names, self.png = folder, names, png
        self.shape = (count, image_size, image_size, 3)
        self.chunks = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
        self.work, self.marks = folder / "work", folder / "work" / "done"

    def npz(self, name: str) -> Path:
        """Finished pictures of a schedule."""
        return self.folder / f"{name}.npz"

    def _pixels(self, name: str) -> Path:
        return self.work / f"{name}.u8"

    @property
    def unfinished(self) -> list[str]:
        """Schedules that have no .npz yet."""
        return [name for name in self.names if not self.npz(name).exists()]

    def _begun(self) -> bool:
        return all(self._pixels(name).exists() for name in self.unfinished)

    def left(self) -> list[int]:
        """Chunks that are still to be made."""
        if not self.unfinished:
            return []
        done = {path.name for path in self.marks.glob("*")} if self._begun() else set()
        return [c for c in range(len(self.chunks)) if f"{c:06d}" not in done]

    def check(self, config: dict[str, Any]) -> None:
        """Refuse a folder that belongs to another run.

        Raises:
            InputError: naming what differs.
        """
        path = self.folder / "config.json"
        if path.exists():
            found = read_json(path)
            differ = [key for key in config if not isinstance(found, dict) or found.get(key) != config[key]]
            if differ:
                raise InputError(f"{self.folder} holds another sweep (other {', '.join(differ)}); remove it or choose another --sample-dir")
        elif any(path.exists() for path in (*map(self.npz, self.names), self.work)):
            raise InputError(f"{self.folder} holds samples of unknown settings, or a folder work/ (no config.json); choose another --sample-dir")

    def begin(self, config: dict[str, Any]) -> None:
        """Prepare for the chunks that are left.

        Raises:
            InputError: if the disk does not take it.
        """
        with self._disk():
            write_json(self.folder / "config.json", config)
            if not self._begun():
                shutil.rmtree(self.work, ignore_errors=True)  # marks of pictures that are not there
            self.marks.mkdir(parents=True, exist_ok=True)
            for name in self.names:
                self._pixels(name).touch()

    def is_marked(self, chunk: int) -> bool:
        """Whether a chunk is on disk."""
        return (self.marks / f"{chunk:06d}").exists()

    def write(self, chunk: int, images: Iterable[Tensor]) -> None:
        """Store a chunk, uint8 (n, 3, H, W) for each schedule, then mark it.

        Raises:
            InputError: if the disk does not take it.
        """
        with self._disk():
            self._write(chunk, images)

    def _write(self, chunk: int, images: Iterable[Tensor]) -> None:
        numbers = self.chunks[chunk]
        for name, pictures in zip(self.names, images, strict=True):
            pixels = pictures.permute(0, 2, 3, 1).contiguous().numpy()
            # Not memory-mapped: over a network disk, two machines that map one file undo each other's pages; and a full disk would be a crash.
            with open(os.open(self._pixels(name), os.O_WRONLY), "wb") as file:
                file.seek(numbers.start * pixels[0].nbytes)
                file.write(pixels.data)
                file.flush()
                os.fsync(file.fileno())
            if self.png:
                for i, picture in zip(numbers, pixels, strict=True):
                    save_image(self.folder / name / f"{i:06d}.png", Image.fromarray(picture))
        (self.marks / f"{chunk:06d}").touch()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"could not write to {self.folder} ({error.strerror}); mend that and run again, it goes on where it was") from None

    def finish(self, config: dict[str, Any]) -> None:
        """Make the .npz files, equal pictures giving equal bytes, and remove work/; memory does not grow with N.

        Raises:
            InputError: if the disk does not take them.
        """
        if self.unfinished or self.work.exists():
            with self._disk():
                self._finish(config)

    def _finish(self, config: dict[str, Any]) -> None:
        ours = {"config", *self.names}  # `atomic_path` puts a point before and a number behind the name; what else is in the folder is somebody's
        left_by_a_kill = [path for path in self.folder.glob(".*.tmp.*") if path.name[1:].rsplit(".", 3)[0] in ours]
        for path in [*left_by_a_kill, *(path for name in self.names for path in (self.folder / name).glob(".*.tmp.png"))]:
            path.unlink()
        for name in tqdm(self.unfinished, desc="writing", unit="file"):
            write_json(self.folder / f"{name}.json", {key: config[key] for key in config if key != "schedules"} | config["schedules"][name])
            # zipfile dates an entry of ZipInfo 1980, so that the bytes do not tell when they were written.
            with (
                atomic_path(self.npz(name)) as temporary,
                zipfile.ZipFile(temporary, "w") as archive,
                archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry,
                open(self._pixels(name), "rb") as pixels,
            ):
                np.lib.format.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": self.shape})
                shutil.copyfileobj(pixels, entry, 2**20)
            self._pixels(name).unlink()
        shutil.rmtree(self.work, ignore_errors=True)
