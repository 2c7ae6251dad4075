"""A run of `ldm/main.py`: data, model and Lightning's trainer, made of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar

from ldm.autoencoder import find, load_autoencoder
from ldm.callbacks import ImageLogger, LossLog
from ldm.checkpoints import LDMCheckpoint, compvis_state_dict, read_ldm
from ldm.config import LDMConfig, read_model
from ldm.training import LatentDiffusion, StepLoader
from tstitch.checkpoints import first_line, save_weights
from tstitch.data import Features, ImageLatents, class_weights, open_features
from tstitch.errors import InputError
from tstitch.files import atomic_path, check_folder
from tstitch.pictures import ImageFolder

_DATA = {"batch_size", "num_workers", "class_balance", "train", "validation", "wrap"}
_TRAINER = {"accelerator": "auto", "devices": 1, "max_epochs": -1, "num_sanity_val_steps": 0}


class LatentData(pl.LightningDataModule):
    """Batches of latents and labels, in an order that depends on the seed and the step alone."""

    def __init__(self, train: Features, validation: Features | None, batch_size: int, class_balance: float, seed: int) -> None:
        super().__init__()
        self.train, self.validation, self.batch_size, self.seed = train, validation, batch_size, seed
        self.weights = class_weights(train.labels, class_balance) if class_balance else None

    def train_dataloader(self) -> StepLoader:
        """An epoch, from where training is."""
        return StepLoader(self.train, self.weights, self.batch_size, self.seed, self.trainer.lightning_module)


@dataclass
class Experiment:
    """Everything that a run needs, checked."""

    model: LatentDiffusion
    data: LatentData
    trainer: pl.Trainer
    folder: Path
    content: Mapping[str, Any]
    resumed: Path | None

    def describe(self) -> str:
        """What is trained, on what, how, in a few lines."""
        count = sum(parameter.numel() for parameter in self.model.denoiser.unet.parameters())
        return (
            f"{self.folder}: U-Net of {count / 1e6:.2f} M parameters on {len(self.data.train)} items, batches of {self.data.batch_size}, "
            f"learning rate {self.model.learning_rate:.3g}, {self.trainer.max_steps} steps" + (f", goes on from {self.resumed}" if self.resumed else "")
        )

    def fit(self, export: Path | None) -> None:
        """Train, then export."""
        check_folder(self.folder)
        if self.trainer.is_global_zero:
            with atomic_path(self.folder / "config.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(dict(self.content), sort_keys=False))
        self.trainer.fit(self.model, self.data, ckpt_path=self.resumed, weights_only=self.resumed is not None or None)
        if export is not None and self.trainer.is_global_zero:
            export_denoiser(export, self.model)
            print(f"moving average -> {export}")


def export_denoiser(path: Path, model: LatentDiffusion) -> None:
    """Write the U-Net's moving average and its class embedder as fp16 safetensors under CompVis' names, with the U-Net's `params` in the header."""
    denoiser = model.averaged
    state = LDMCheckpoint([compvis_state_dict(denoiser.unet)], [], [{"embedding.weight": denoiser.embedder.weight}]).state_dict()
    save_weights(path, state, {"unet": dict(model.config.unets[0]), "num_classes": model.config.num_classes})


def build_experiment(
    content: Mapping[str, Any], folder: Path, flags: Mapping[str, Any], *, seed: int, scale_lr: bool, init_from: Path | None, resumed: Path | None
) -> Experiment:
    """Make data, model and trainer of a configuration.

    Args:
        content: sections model, data and lightning.
        flags: arguments of Lightning's Trainer, over those of the configuration.

    Raises:
        InputError: for the first thing that is missing or does not fit.
    """
    config = read_model(content)
    trainer_options = _TRAINER | dict(_section(content, "lightning", "trainer")) | dict(flags)
    pl.seed_everything(seed, verbose=False)
    train, validation, options = _open_data(content, config)
    batch_size = options.get("batch_size", 64)
    steps_every = _section(content, "lightning", "modelcheckpoint").get("every_n_train_steps", 5000)
    drawn = _section(content, "lightning", "callbacks").get("image_logger", {})
    callbacks = [
        LossLog(folder / "log.jsonl", trainer_options.pop("log_every_n_steps", 50)),
        ImageLogger(folder / "images", load_autoencoder(config.first_stage), **drawn.get("params", drawn)),
        TQDMProgressBar(refresh_rate=20),
        # The newest checkpoint is last.ckpt; it is written to a temporary name and renamed.
        ModelCheckpoint(
            folder / "checkpoints", filename="{step:07d}", every_n_train_steps=steps_every, save_last=True, save_top_k=1, monitor="step", mode="max"
        ),
    ]
    try:
        trainer = pl.Trainer(default_root_dir=folder, callbacks=callbacks, logger=False, enable_model_summary=False, **trainer_options)
    except (TypeError, ValueError, RuntimeError, pl.utilities.exceptions.MisconfigurationException) as error:
        raise InputError(f"Lightning's Trainer refused its flags: {first_line(error)}") from None
    rate = config.base_learning_rate * (trainer.accumulate_grad_batches * trainer.world_size * batch_size if scale_lr else 1)
    model = LatentDiffusion(config, rate)
    if init_from is not None:
        model.load_published(read_ldm(init_from), str(init_from))
    data = LatentData(train, validation, batch_size, options.get("class_balance", 0.0), seed)
    return Experiment(model, data, trainer, folder, content, resumed)


def _section(content: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A part of the configuration, {} where it is not there."""
    for name in names:
        content = content.get(name) or {}
    return content


def _open_data(content: Mapping[str, Any], config: LDMConfig) -> tuple[Features, Features | None, Mapping[str, Any]]:
    options = _section(content, "data", "params")
    if unknown := [name for name in options if name not in _DATA]:
        raise InputError(f"unknown option {', '.join(unknown)} of data.params; choose from {', '.join(sorted(_DATA))}")
    if "train" not in options:
        raise InputError("data.params needs train: {features: FOLDER} or train: {pictures: FOLDER, image_size: 256}; add it")
    train = _open(options["train"], config)
    if train.num_classes > config.num_classes:
        raise InputError(f"the data has {train.num_classes} classes, the class embedder {config.num_classes}; raise n_classes of cond_stage_config")
    return train, _open(options["validation"], config) if options.get("validation") else None, options


def _open(source: Mapping[str, Any], config: LDMConfig) -> Features:
    if source.keys() - {"features", "pictures", "image_size", "flip", "target", "params"}:
        raise InputError(f"data takes features, or pictures with image_size and flip; got {', '.join(source)}")
    if "features" in source:
        data = open_features(Path(find(source["features"])))
    elif "pictures" in source:
        pictures = ImageFolder(Path(source["pictures"]), source.get("image_size", 256))
        data = ImageLatents(pictures, load_autoencoder(config.first_stage), flip=source.get("flip", True))
    else:
        raise InputError("data needs features: FOLDER or pictures: FOLDER; add one")
    if tuple(data.latent_shape) != config.latent_shape:
        raise InputError(f"the data's latents are {list(data.latent_shape)}, not {list(config.latent_shape)}; change image_size and channels")
    return data
