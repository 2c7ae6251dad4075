"""Training data: latents and labels, from features made once or from pictures encoded while training.

A feature store is one folder, addressed by item (the picture's place in the sorted list of files):

    index.json   what it is: count, mirror images, latent shape, classes, the VAE and its scaling factor, the items that could not be decoded
    moments.npy  float16 (count, mirrors, 2C, h, w): mean and log variance of the VAE's posterior, memory-mapped
    labels.npy   int64 (count,)

Moments instead of one frozen draw: every epoch draws its own latents, and a flip when both mirror images are stored. The layout of fast-DiT, one frozen
draw a file, is read and written too: imagenet256_features/{item}.npy float32 (1, C, h, w), scaled, beside imagenet256_labels/{item}.npy int64 (1,).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tstitch.autoencoder import Autoencoder, weights_file
from tstitch.checkpoints import file_hash, first_line
from tstitch.errors import InputError
from tstitch.files import atomic_path, existing_folder, read_json, write_json
from tstitch.noise import SampleNoise
from tstitch.pictures import ImageFolder


class Features(Protocol):
    """What a trainer asks of its data: labels (N,) int64, and latents (n, C, h, w), scaled, float32, for items (n,); `index` describes it as JSON.

    What is drawn comes from `generator`, without one from torch's global generator; the two give the same from the same state.
    """

    labels: Tensor
    num_classes: int
    latent_shape: tuple[int, ...]
    index: dict[str, Any]

    def __len__(self) -> int: ...
    def latents(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents."""


def class_weights(labels: Tensor, power: float) -> Tensor:
    """Sampling weight of each item, 1 / (size of its class) ** power: 0 draws items evenly, 1 draws classes evenly."""
    return (1.0 / labels.bincount().clamp(min=1).float() ** power)[labels]


def draw_latents(moments: Tensor, noise: SampleNoise | None, scaling_factor: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw scaled latents (N, C, h, w) from moments (N, 2C, h, w) on the CPU; without `noise`, from a generator, see `Features`."""
    mean, log_variance = moments.chunk(2, dim=1)
    drawn = torch.randn(mean.shape, generator=generator) if noise is None else noise(-1, mean)  # randn_like would depend on the order of the tensor's memory
    return (mean + (0.5 * log_variance).exp() * drawn) * scaling_factor


def describe(pictures: ImageFolder, autoencoder: Autoencoder, mirrors: int) -> dict[str, Any]:
    """What index.json says of features of these pictures by this autoencoder, with (mirrors = 2) or without their mirror images."""
    return {
        "count": len(pictures),
        "mirrors": mirrors,
        "latent_shape": list(autoencoder.latent_shape(pictures.image_size)),
        "image_size": pictures.image_size,
        "num_classes": pictures.num_classes,
        "class_names": pictures.class_names,
        "pictures_hash": pictures.hash,
        "vae": autoencoder.source,
        "vae_hash": file_hash(autoencoder.weights),
        "scaling_factor": autoencoder.scaling_factor,
    }


class FeatureWriter:
    """Fills a feature store from any number of processes, and goes on where a killed run was.

    Every item has its own place in the files, so it does not matter who writes it. status.bin has one byte an item, set once the item is on disk; until
    the last is set there is no index.json, only unfinished.json, and no reader opens the folder.

    Args:
        index: what index.json shall say: count, mirrors, latent_shape and so on.
        labels: (count,), in 0..num_classes-1.
    """

    STORED, DAMAGED = 1, 2  # in status.bin; 0 is an item that nobody has come to
    layout: str = "store"
    dtype: type[np.floating] = np.float16

    def __init__(self, folder: Path, index: dict[str, Any], labels: Tensor) -> None:
        self.folder, self.labels = folder, labels
        self.index = {"layout": self.layout, "dtype": np.dtype(self.dtype).name, **index}
        self.finished, self.unfinished, self.status = folder / "index.json", folder / "unfinished.json", folder / "status.bin"

    def begin(self) -> None:
        """Lay out the files, or find those of an earlier run; one process calls it before any other goes on.

        Raises:
            InputError: if the folder was begun with other settings, or the disk is too small.
        """
        earlier = self.check()
        if earlier is None or self.finished.exists():
            status = np.full(self.index["count"], 0 if earlier is None else self.STORED, dtype=np.uint8)
            status[[damaged["item"] for damaged in (earlier or {}).get("damaged", [])]] = self.DAMAGED
            with atomic_path(self.status) as temporary:
                status.tofile(temporary)
            write_json(self.unfinished, self.index)  # from here on the files are known to be this run's
            self.finished.unlink(missing_ok=True)
        if not len(self.items_with(self.STORED)):  # also where a kill came before
            self._lay_out()

    def check(self) -> dict[str, Any] | None:
        """What an earlier run said of the folder, None where there was none; writes nothing.

        Raises:
            InputError: as `begin`.
        """
        earlier = next((read_json(path) for path in (self.finished, self.unfinished) if path.exists()), None)
        if earlier is None:
            for path in (self.folder / "labels.npy", self.folder / "moments.npy"):
                if path.exists():
                    raise InputError(f"{path} is there, and no index.json says what it is; choose another folder for the features, or remove it")
            self._check_room()
            return None
        # The hash says which VAE it is, wherever it lies.
        was = [f"{key}={earlier.get(key)!r}" for key in self.index if key != "vae" and self.index[key] != earlier.get(key)]
        if was:
            raise InputError(f"{self.folder} was begun with {', '.join(was)[:300]}; pass the same values or choose another folder for the features")
        return earlier

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of all features."""
        return (self.index["count"], self.index["mirrors"], 2 * self.index["latent_shape"][0], *self.index["latent_shape"][1:])

    @property
    def nbytes(self) -> int:
        """Bytes that the features and their labels take."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize + self.labels.nbytes

    def _check_room(self) -> None:
        free = shutil.disk_usage(existing_folder(self.folder)).free
        if self.nbytes > free:
            raise InputError(f"{self.folder} needs {self.nbytes / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; choose another disk")

    def _lay_out(self) -> None:
        with atomic_path(self.folder / "labels.npy") as temporary:
            np.save(temporary, self.labels.numpy())
        with atomic_path(self.folder / "moments.npy") as temporary:
            np.lib.format.open_memmap(temporary, mode="w+", dtype=self.dtype, shape=self.shape)

    def _read_status(self) -> np.ndarray:
        status = np.fromfile(self.status, dtype=np.uint8) if self.status.exists() else np.zeros(0, dtype=np.uint8)
        if len(status) != self.index["count"]:
            raise InputError(f"{self.status} is missing or truncated, so nobody knows what is done; remove {self.folder} and extract again")
        return status

    def items_with(self, status: int) -> np.ndarray:
        """Items of one status, ascending."""
        return np.flatnonzero(self._read_status() == status)

    def todo(self, batch: int) -> list[Tensor]:
        """Batches of items that are not all stored, cut as in a run that was never killed: how many pictures share one call may move the last bit."""
        stored = torch.from_numpy(self._read_status() == self.STORED)
        return [items for items in torch.arange(self.index["count"]).split(batch) if not stored[items].all()]

    def views(self, items: Tensor, images: Tensor) -> list[Tensor]:
        """What to encode for these items: their pictures, and the mirrored pictures if both are kept."""
        return [images, images.flip(-1)][: self.index["mirrors"]]

    def write(self, items: Sequence[int], moments: np.ndarray) -> None:
        """Store moments (n, views, 2C, h, w) of n items, and then say so.

        Raises:
            InputError: if a value is not finite, or the disk is full.
        """
        with np.errstate(over="ignore"):  # said below
            rows = moments.astype(self.dtype)
        if not np.isfinite(rows).all():
            raise InputError("the autoencoder gives values that are not finite; pass --dtype fp32")
        try:
            self._write(items, rows)
            self.mark(items, self.STORED)
        except OSError as error:
            raise InputError(f"could not write to {self.folder} ({error.strerror}); mend that and run again, it goes on where it was") from None

    def _write(self, items: Sequence[int], rows: np.ndarray) -> None:
        # Plain writes, not stores through a memory map: a full disk is an error then and no crash, and processes on two machines share no pages.
        path = self.folder / "moments.npy"
        start = np.load(path, mmap_mode="r").offset
        with open(path, "r+b") as file:
            for item, row in zip(items, rows, strict=True):
                file.seek(start + item * row.nbytes)
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def mark(self, items: Sequence[int], status: int) -> None:
        """Note the status of items."""
        with open(self.status, "r+b") as file:
            for item in items:
                file.seek(item)
                file.write(bytes([status]))

    def finish(self, names: Sequence[str] = ()) -> None:
        """Write index.json, which lists damaged items by `names`; one process calls it when all are done.

        Raises:
            InputError: if items are missing.
        """
        missing = len(self.items_with(0))
        if missing:
            raise InputError(f"{missing} of {self.index['count']} features in {self.folder} are missing; run the extraction again, it goes on where it was")
        write_json(self.finished, self.index | {"damaged": [{"item": int(item), "file": names[item]} for item in self.items_with(self.DAMAGED)]})
        self.unfinished.unlink()
        self.status.unlink()


class FileWriter(FeatureWriter):
    """Writes fast-DiT's layout: one frozen draw of one mirror image a file, both chosen by the item's number alone."""

    layout, dtype = "files", np.float32

    def _folders(self) -> tuple[Path, Path]:
        features, labels = (self.folder / f"imagenet256_{kind}" for kind in ("features", "labels"))  # at every size: fast-DiT's trainer asks for it
        return features, labels

    @property
    def nbytes(self) -> int:
        """Bytes that the files take: a frozen draw and a label an item, each with numpy's header."""
        return self.index["count"] * (4 * int(np.prod(self.index["latent_shape"])) + 8 + 2 * 128)

    def _check_room(self) -> None:
        super()._check_room()
        for folder in self._folders():
            if folder.is_dir() and any(folder.iterdir()):
                raise InputError(f"{folder} holds files of another extraction already; choose another folder for the features")

    def _lay_out(self) -> None:
        for folder in self._folders():
            folder.mkdir(parents=True, exist_ok=True)

    def views(self, items: Tensor, images: Tensor) -> list[Tensor]:
        """One view: the picture, or its mirror image."""
        mirrored = SampleNoise(items.tolist()).labels(self.index["mirrors"]).bool()
        return [torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)]

    def mark(self, items: Sequence[int], status: int) -> None:
        """Note the status of items; a damaged one has no file, not even of an earlier run that could decode it."""
        if status == self.DAMAGED:
            for item in items:
                for folder in self._folders():
                    (folder / f"{item}.npy").unlink(missing_ok=True)
        super().mark(items, status)

    def _write(self, items: Sequence[int], rows: np.ndarray) -> None:
        latents = draw_latents(torch.from_numpy(rows[:, 0]), SampleNoise(items), self.index["scaling_factor"])
        features, labels = self._folders()
        for item, latent in zip(items, latents.numpy(), strict=True):
            np.save(features / f"{item}.npy", latent[None])
            np.save(labels / f"{item}.npy", self.labels[item : item + 1].numpy())


WRITERS = {writer.layout: writer for writer in (FeatureWriter, FileWriter)}


def write_features(
    folder: Path,
    moments: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    vae: str,
    scaling_factor: float,
    **about: Any,  # noqa: ANN401  (whatever JSON takes)
) -> None:
    """Write a whole feature store at once, in place of one that may be there.

    Args:
        moments: (count, mirrors, 2C, h, w), mean and log variance.
        labels: (count,) in 0..num_classes-1.
        about: further words for index.json, class_names or vae_hash for instance.
    """
    if any((folder / name).exists() for name in ("index.json", "unfinished.json")):
        for name in ("moments.npy", "labels.npy", "status.bin", "unfinished.json", "index.json"):  # while they last, the indices say whose the others are
            (folder / name).unlink(missing_ok=True)
    count, mirrors, channels, height, width = moments.shape
    index = {"count": count, "mirrors": mirrors, "latent_shape": [channels // 2, height, width], "num_classes": num_classes}
    writer = FeatureWriter(folder, index | {"vae": vae, "scaling_factor": scaling_factor, **about}, torch.from_numpy(labels.astype(np.int64)))
    writer.begin()
    writer.write(range(count), moments)
    writer.finish()


def open_features(path: Path) -> FeatureStore | FileFeatures:
    """Open a feature folder of either layout for training.

    Raises:
        InputError: if it is missing, unfinished, damaged or of the wrong count.
    """
    if not (path / "index.json").exists() and any(path.glob("*_features")):
        return FileFeatures(path)
    return FileFeatures(path) if _read_index(path).get("layout") == "files" else FeatureStore(path)


def check_vae(data: Features, vae: str) -> None:
    """Refuse latents that another autoencoder made; where nobody knows, they pass.

    Args:
        vae: a folder or a hub name.

    Raises:
        InputError: naming the one that made them.
    """
    weights = weights_file(vae)
    if weights.exists() and data.index.get("vae_hash") not in (None, file_hash(weights)):
        raise InputError(f"the latents were made by {data.index['vae']}, not by {vae}; pass it with --vae")


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / "index.json").exists():
        if (folder / "unfinished.json").exists():
            raise InputError(f"the features at {folder} are unfinished; run dit/extract_features.py again, it goes on where it was")
        raise InputError(f"no features at {folder} (index.json is missing); extract them first")
    index = read_json(folder / "index.json")
    missing = {"count", "mirrors", "latent_shape", "num_classes", "scaling_factor"} - index.keys()
    if missing:
        raise InputError(f"{folder / 'index.json'} does not say {', '.join(sorted(missing))}; extract the features again")
    return index


class FeatureStore:
    """A feature store opened for training. Items whose pictures were damaged are left out: no draw can meet them.

    `labels` (N,) int64, `latent_shape` (C, h, w), `num_classes`, `index` as on disk.

    Raises:
        InputError: if the folder is unfinished or its arrays contradict its index.
    """

    def __init__(self, folder: Path) -> None:
        self.index = _read_index(folder)
        self.latent_shape: tuple[int, ...] = tuple(self.index["latent_shape"])
        self.num_classes: int = self.index["num_classes"]
        try:
            self.moments = np.load(folder / "moments.npy", mmap_mode="r")
            labels = torch.from_numpy(np.load(folder / "labels.npy"))
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"the features at {folder} are damaged ({error}); extract them again") from None
        count, channels = self.index["count"], self.latent_shape[0]
        if not len(self.moments) == len(labels) == count:
            raise InputError(f"{folder} holds {len(self.moments)} features and {len(labels)} labels, its index says {count}; extract again")
        shape = (count, self.index["mirrors"], 2 * channels, *self.latent_shape[1:])
        if self.moments.shape != shape or not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise InputError(f"{folder} holds moments of shape {self.moments.shape} or labels that its index does not expect; extract again")
        self._rows = np.delete(np.arange(count), [damaged["item"] for damaged in self.index.get("damaged", [])])
        self.labels = labels[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def latents(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw scaled latents (n, C, h, w), float32, for index (n,) in 0..len-1: posterior noise and mirror come from a generator, see `Features`."""
        mirror = torch.randint(self.index["mirrors"], index.shape, generator=generator)
        moments = torch.from_numpy(self.moments[self._rows[index.numpy()], mirror.numpy()]).float()
        return draw_latents(moments, None, self.index["scaling_factor"], generator)


class FileFeatures:
    """Features in fast-DiT's layout, opened for training; a feature and its label belong together by their number.

    `labels` (N,) int64, `latent_shape` (C, h, w), `num_classes` (the largest label + 1 where no index.json says), `index`.

    Raises:
        InputError: if the folder is unfinished, or features and labels do not pair.
    """

    def __init__(self, folder: Path) -> None:
        found = sorted(folder.glob("*_features"))
        if len(found) != 1:
            raise InputError(f"{folder} holds {len(found)} folders named *_features, expected one; pass a folder with one data set")
        if (folder / "unfinished.json").exists():
            _read_index(folder)
        self._features, labels = found[0], found[0].with_name(found[0].name.removesuffix("features") + "labels")
        self.numbers, of_labels = _numbers(self._features), _numbers(labels)
        if not self.numbers or self.numbers != of_labels:
            unpaired = sorted(set(self.numbers) ^ set(of_labels))
            raise InputError(f"{self._features} and {labels} do not pair ({len(unpaired)} numbers in one alone, {unpaired[:3]}); extract again")
        numbers = tqdm(self.numbers, desc="labels", unit="file", disable=len(self.numbers) < 10_000)
        self.labels = torch.tensor([int(_load(labels / f"{number}.npy").item()) for number in numbers])
        self.latent_shape: tuple[int, ...] = _load(self._features / f"{self.numbers[0]}.npy").shape[-3:]
        count: dict[str, Any] = {"layout": "files", "count": len(self), "latent_shape": list(self.latent_shape), "num_classes": int(self.labels.max()) + 1}
        self.index = _read_index(folder) if (folder / "index.json").exists() else count
        if self.index["count"] - len(self.index.get("damaged", [])) != len(self):
            raise InputError(f"{folder} holds {len(self)} features, its index says {self.index['count']}; extract again")
        self.num_classes: int = self.index["num_classes"]

    def __len__(self) -> int:
        return len(self.numbers)

    def latents(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents (n, C, h, w), float32, for index (n,) in 0..len-1: always the same draw."""
        files = [self._features / f"{self.numbers[i]}.npy" for i in index.tolist()]
        latents = [_load(file) for file in files]
        wrong = next((file for file, latent in zip(files, latents, strict=True) if latent.size != np.prod(self.latent_shape)), None)
        if wrong:
            raise InputError(f"{wrong} is not of shape {self.latent_shape}; extract it again")
        return torch.from_numpy(np.stack([latent.reshape(self.latent_shape) for latent in latents])).float()


class ImageLatents:
    """Pictures encoded while training: always fresh, but each step waits for the decoder of pictures and for the autoencoder.

    Draws what a feature store of these pictures draws from the same state of torch's global generator, up to the store's float16.
    """

    def __init__(
        self, pictures: ImageFolder, vae: str | Path | Autoencoder, device: torch.device | str = "cpu", num_threads: int = 4, flip: bool = True
    ) -> None:
        self.pictures, self.autoencoder = pictures, vae if isinstance(vae, Autoencoder) else Autoencoder(vae, device)
        self.labels, self.num_classes = pictures.labels, pictures.num_classes
        self.latent_shape: tuple[int, ...] = self.autoencoder.latent_shape(pictures.image_size)
        self.index = {"layout": "pictures", **describe(pictures, self.autoencoder, 2 if flip else 1)}
        self._threads = ThreadPoolExecutor(num_threads)

    def __len__(self) -> int:
        return len(self.pictures)

    def latents(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw scaled latents (n, C, h, w), float32, for index (n,) in 0..len-1: posterior noise and mirror come from a generator, see `Features`.

        Raises:
            DamagedPictureError: if one of the pictures cannot be decoded.
        """
        mirror = torch.randint(self.index["mirrors"], index.shape, generator=generator).bool()
        images = torch.stack(list(self._threads.map(self.pictures.image, index.tolist(), mirror.tolist())))
        return draw_latents(self.autoencoder.encode(images), None, self.index["scaling_factor"], generator)


def _numbers(folder: Path) -> list[int]:
    """Numbers k of the files k.npy, ascending."""
    return sorted(int(path.stem) for path in folder.glob("*.npy") if path.stem.isdigit())


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged ({first_line(error)}); extract it again") from None
