"""What a run of `ldm/main.py` learns from: latents or pictures, in batches that depend on the seed and the step alone.

A batch is (x, y, seed): latents or pictures (n, C, H, W), labels (n,), and the seed of all that is drawn besides.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.autoencoder import find, first_stage_source
from ldm.config import FirstStageConfig
from tstitch.autoencoder import Autoencoder
from tstitch.data import Features, ImageLatents, check_vae, class_weights, open_features
from tstitch.errors import InputError
from tstitch.pictures import ImageFolder
from tstitch.training import draw_batch, step_seed

Batch = tuple[Tensor, Tensor, int]
IMAGENET = {"ImageNetTrain": "ILSVRC2012_train", "ImageNetValidation": "ILSVRC2012_validation"}  # folders of the published data classes


class Pixels:
    """Pictures as a first stage is trained on: `latents` are (n, 3, H, W) in [-1, 1], mirrored by torch's global generator where `flip` says so."""

    def __init__(self, pictures: ImageFolder, flip: bool, num_threads: int = 4) -> None:
        self.pictures, self.flip = pictures, flip
        self.labels, self.num_classes = pictures.labels, pictures.num_classes
        self.latent_shape: tuple[int, ...] = (3, pictures.image_size, pictures.image_size)
        self.index = {"layout": "pictures", "count": len(pictures), "pictures_hash": pictures.hash}
        self._threads = ThreadPoolExecutor(num_threads)

    def __len__(self) -> int:
        return len(self.pictures)

    def latents(self, index: Tensor) -> Tensor:
        """Pictures of items (n,).

        Raises:
            DamagedPictureError: if one of them cannot be decoded.
        """
        mirror = torch.randint(2, index.shape).bool() & self.flip
        return self.read(index, mirror)

    def read(self, index: Tensor, mirror: Tensor) -> Tensor:
        """Pictures of items (n,), mirrored where `mirror` (n,) says so."""
        return torch.stack(list(self._threads.map(self.pictures.image, index.tolist(), mirror.tolist()))).float() / 127.5 - 1


def open_pixels(source: Mapping[str, Any], part: str) -> Pixels:
    """Open data.params.`part` of a configuration for a first stage.

    Raises:
        InputError: naming what is missing or unknown.
    """
    source = _described(source, part)
    if "features" in source:
        raise InputError(f"a first stage learns from pictures; pass data.params.{part}.pictures=FOLDER in place of features")
    return Pixels(_pictures(source, part), source.get("flip", True))


def open_latents(source: Mapping[str, Any], part: str, first_stage: FirstStageConfig, autoencoder: Autoencoder, latent_shape: tuple[int, ...]) -> Features:
    """Open data.params.`part` of a configuration for a U-Net: features made before, or pictures that the first stage encodes while training.

    Args:
        autoencoder: the first stage, loaded.

    Raises:
        InputError: naming what is missing, unknown or does not fit.
    """
    source = _described(source, part)
    if "features" in source:
        data: Features = open_features(Path(find(source["features"])))
        _check_first_stage(data, part, first_stage, autoencoder)
    else:
        data = ImageLatents(_pictures(source, part), autoencoder, flip=source.get("flip", True))
    if tuple(data.latent_shape) != latent_shape:
        raise InputError(f"the data's latents are {list(data.latent_shape)}, not {list(latent_shape)}; change image_size and channels")
    return data


def _check_first_stage(data: Features, part: str, first_stage: FirstStageConfig, autoencoder: Autoencoder) -> None:
    instead = f"pass data.params.{part}.pictures=FOLDER, or the first stage that made them"
    try:
        check_vae(data, first_stage_source(first_stage))
    except InputError as error:
        raise InputError(f"{str(error).rsplit(';', 1)[0]}; {instead}") from None
    if (scale := data.index.get("scaling_factor")) is not None and abs(scale - autoencoder.scaling_factor) > 1e-6 * scale:
        raise InputError(f"the features are scaled by {scale}, the first stage {autoencoder.source} by {autoencoder.scaling_factor}; {instead}")


def _described(source: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """What a source says, the published words {target, params: {config: {size}}} put into ours."""
    if not isinstance(source, Mapping) or (unknown := source.keys() - {"features", "pictures", "image_size", "flip", "target", "params"}):
        what = ", ".join(sorted(unknown)) if isinstance(source, Mapping) else source
        raise InputError(f"data.params.{part} has {what}; it takes features: FOLDER, or pictures: FOLDER with image_size and flip")
    if "features" in source or "pictures" in source:
        return source
    name = str(source.get("target")).rsplit(".", 1)[-1]
    if name not in IMAGENET:
        raise InputError(f"data.params.{part} names no data; add features: FOLDER or pictures: FOLDER (targets known here: {', '.join(IMAGENET)})")
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "autoencoders", "data", IMAGENET[name])
    if not folder.is_dir():
        raise InputError(f"no ImageNet at {folder}; pass data.params.{part}.pictures=FOLDER or features=FOLDER" + " (or validation=null)" * (part != "train"))
    config = (source.get("params") or {}).get("config") or {}
    return {"pictures": str(folder / "data" if (folder / "data").is_dir() else folder), "image_size": config.get("size") or 256, "flip": part == "train"}


def _pictures(source: Mapping[str, Any], part: str) -> ImageFolder:
    size = source.get("image_size", 256)
    if not isinstance(size, int) or size < 1:
        raise InputError(f"data.params.{part}.image_size is the height of the pictures in pixels, got {size}")
    return ImageFolder(Path(find(source["pictures"])), size)


class StepLoader:
    """Batches of an epoch of this process, from where its training is.

    Lightning asks it anew in each epoch, and after a resume in the middle of one; it looks up the step, so no state has to be stored.

    Args:
        data: latents and labels.
        weights: how often each item is drawn (N,), None for every item once an epoch.
        batch_size: items of a part.
    """

    def __init__(self, data: Features, weights: Tensor | None, batch_size: int, seed: int, module: pl.LightningModule) -> None:
        self.data, self.weights, self.batch_size, self.seed, self.module = data, weights, batch_size, seed, module
        self.accumulation = module.trainer.accumulate_grad_batches
        self.num_parts = module.trainer.world_size * self.accumulation
        self.steps = max(1, len(data) // (batch_size * self.num_parts))  # of an epoch

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[Batch]:
        for step in itertools.count(self.module.steps_done):  # Lightning ends the epoch
            for k in range(self.accumulation):
                part = self.module.trainer.global_rank * self.accumulation + k
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(step_seed(self.seed, step, part))
                    index = draw_batch(
                        self.weights, len(self.data), step=step, part=part, num_parts=self.num_parts, size=self.batch_size, seed=self.seed
                    )  # fmt: skip
                    latents = self.data.latents(index)
                yield latents, self.data.labels[index], step_seed(self.seed + 1, step, part)

    def state_dict(self) -> dict[str, int]:
        """Tells Lightning that a resume in the middle of an epoch is in order."""
        return {"step": self.module.steps_done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Nothing to restore: the trainer knows the step."""


class FixedLoader:
    """All items of held-out data in order, with the same draws each time; of several processes each takes every so many-th batch.

    Raises:
        InputError: if there are fewer batches than processes.
    """

    def __init__(self, data: Features, batch_size: int, seed: int, trainer: pl.Trainer) -> None:
        self.data, self.seed = data, seed
        batches = list(enumerate(torch.arange(len(data)).split(batch_size)))
        if len(batches) < trainer.world_size:
            raise InputError(f"the validation data make {len(batches)} batches, fewer than the {trainer.world_size} devices; lower data.params.batch_size")
        self.batches = batches[trainer.global_rank :: trainer.world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for k, index in self.batches:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(step_seed(self.seed + 2, k))
                latents = self.data.latents(index)
            yield latents, self.data.labels[index], step_seed(self.seed + 3, k)


class RunData(pl.LightningDataModule):
    """Training data and, where there are any, held-out data.

    Args:
        batch_size: items of a process in one pass.
        class_balance: 0 draws items evenly, 1 draws classes evenly.
        autoencoder: what encodes pictures, moved to where training is.
    """

    def __init__(
        self, train: Features, validation: Features | None, batch_size: int, class_balance: float, seed: int, autoencoder: Autoencoder | None = None
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.train, self.validation, self.batch_size, self.seed = train, validation, batch_size, seed
        self.weights = class_weights(train.labels, class_balance) if class_balance else None

    def setup(self, stage: str) -> None:
        """Move the autoencoder; before, Lightning has not told this process its device."""
        if self.autoencoder is not None:
            self.autoencoder.device = self.trainer.strategy.root_device
            self.autoencoder.vae.to(self.autoencoder.device)

    def train_dataloader(self) -> StepLoader:
        """An epoch, from where training is."""
        return StepLoader(self.train, self.weights, self.batch_size, self.seed, self.trainer.lightning_module)

    def val_dataloader(self) -> FixedLoader | list[Any]:
        """The held-out items."""
        return [] if self.validation is None else FixedLoader(self.validation, self.batch_size, self.seed, self.trainer)
