"""A run of `ldm/main.py`: data, model and Lightning's trainer, made of a configuration."""

from __future__ import annotations

import logging
import math
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.autoencoder import load_autoencoder
from ldm.callbacks import AtomicCheckpointIO, ImageLogger, LastCheckpoint, LossLog, ReconstructionLogger
from ldm.config import AutoencoderConfig, LDMConfig, check_names, read_autoencoder, read_model, trains_first_stage
from ldm.data import Pixels, RunData, open_latents, open_pixels
from ldm.first_stage_training import FirstStageTraining
from ldm.training import CompVisModule, LatentDiffusion
from tstitch.autoencoder import Autoencoder
from tstitch.checkpoints import first_line
from tstitch.dry_run import Files, module_bytes, plan_training, show_bytes, show_plan, training_memory
from tstitch.errors import InputError
from tstitch.files import atomic_path, check_folder

LOGGERS = ("csv", "tensorboard", "wandb")
_DATA = {"batch_size": 64, "num_workers": None, "class_balance": 0.0, "train": None, "validation": None, "wrap": None}  # num_workers, wrap: no effect
_TRAINER = {"accelerator": "auto", "devices": 1, "max_epochs": -1, "num_sanity_val_steps": 0}
_CHECKPOINTS = {"every_n_train_steps": 5000, "save_top_k": 3, "mode": "min"}
# What may differ when a run goes on: how long it is, where it runs, what it shows.
_MAY_DIFFER = {
    f"lightning.trainer.{name}" for name in ("max_steps", "max_epochs", "max_time", "accelerator", "enable_progress_bar", "log_every_n_steps", "benchmark")
}  # fmt: skip


def hush() -> None:
    """Keep back what Lightning says of other products and of matters that are settled here."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    warnings.filterwarnings("ignore", message=".*(lr_scheduler.step|isinstance\\(treespec, LeafSpec\\)|does not have many workers).*")


@dataclass
class Experiment:
    """Everything that a run needs, checked."""

    model: CompVisModule
    data: RunData
    trainer: pl.Trainer
    folder: Path
    content: Mapping[str, Any]
    resumed: Path | None
    step: int  # where it goes on

    def describe(self) -> str:
        """What is trained, on what, how, in a few lines."""
        count = sum(parameter.numel() for parameter in self.model.network.parameters())
        end = self.trainer.max_steps
        text = (
            f"{self.folder}: {type(self.model.network).__name__} of {count / 1e6:.2f} M parameters on {len(self.data.train)} items, "
            f"batches of {self.data.batch_size}, learning rate {self.model.learning_rate:.3g}, {f'{end} steps' if end > 0 else 'no last step'}"
        )
        if self.resumed is None:
            return text
        return text + (f"; finished at step {self.step}, raise max_steps to go on" if self.finished else f"; goes on from step {self.step}, {self.resumed}")

    @property
    def finished(self) -> bool:
        """Whether the last step is done already."""
        return 0 < self.trainer.max_steps == self.step

    @property
    def steps_left(self) -> int | None:
        """Optimizer steps until the run ends; None where no end was named, or only a time."""
        trainer = self.trainer
        epoch = math.ceil(self.epoch_batches / trainer.accumulate_grad_batches)
        ends = [trainer.max_steps] * (trainer.max_steps > 0) + [epoch * (trainer.max_epochs or 0)] * ((trainer.max_epochs or -1) > 0)
        return max(0, min(ends) - self.step) if ends else None

    @property
    def epoch_batches(self) -> int:
        """Batches of an epoch, of each process: those of `StepLoader`, or as many as limit_train_batches lets through."""
        trainer, limit = self.trainer, self.trainer.limit_train_batches
        accumulation = trainer.accumulate_grad_batches
        batches = max(1, len(self.data.train) // (self.data.batch_size * trainer.world_size * accumulation)) * accumulation
        return batches if limit is None else min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    @property
    def validations_left(self) -> int | None:
        """Most validations until the run ends; None where nobody knows."""
        trainer, left = self.trainer, self.steps_left
        interval = trainer.val_check_interval
        if self.data.validation is None:
            return 0
        if left is None or not isinstance(interval, int | float):
            return None
        between = interval if isinstance(interval, int) else max(1, int(self.epoch_batches * interval))
        between *= trainer.check_val_every_n_epoch or 1
        before, after = (step * trainer.accumulate_grad_batches // between for step in (self.step, self.step + left))
        return after - before

    def _planned_checkpoints(self, size: float) -> list[Files]:
        """Checkpoints of `size` bytes that will be in the folder at the end: the last one, and the best or all of those that validations make."""
        if self.trainer.fast_dev_run:
            return []
        most, validations = sum(best.save_top_k for best in self.trainer.checkpoint_callbacks if isinstance(best, ModelCheckpoint)), self.validations_left
        if most < 0 and validations is None:
            return [Files("last.ckpt and the log; every validation leaves a checkpoint of that size too", size, self.folder)]
        kept = 1 + (most if validations is None else validations if most < 0 else min(most, validations))
        return [Files(f"{kept} checkpoint{'s' if kept > 1 else ''} of {show_bytes(size)} each, and the log", kept * size, self.folder, at_most=True)]

    def plan(self, export: Path | None) -> None:
        """Answer --dry-run: measure a step, print what training will cost; nothing is written.

        Raises:
            InputError: as `fit`, for what can be seen before.
        """
        check_folder(self.folder)
        trainer, model, device = self.trainer, self.model.train(), self.trainer.strategy.root_device
        optimizer = model.to(device).configure_optimizers()["optimizer"]
        if self.data.autoencoder is not None:
            self.data.autoencoder.device = device
            self.data.autoencoder.vae.to(device)

        def take(size: int) -> None:
            index = torch.arange(size) % len(self.data.train)
            batch = (self.data.train.latents(index).to(device), self.data.train.labels[index].to(device), 0)
            with trainer.precision_plugin.forward_context():
                loss = model.losses(model.judge()[0][1], batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        parts = trainer.world_size * trainer.accumulate_grad_batches
        left = self.steps_left
        times = None if left is None else left * parts
        works, how = plan_training(take, self.data.batch_size, times=times, device=device, processes=trainer.world_size)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        size = module_bytes(model) + 8 * trained
        files = self._planned_checkpoints(size)
        if export is not None:
            files.append(Files("exported weights", 2 * sum(parameter.numel() for parameter in model.averaged.parameters()), export.parent))
        if trainer.is_global_zero:
            said = "no last step" if left is None else f"{left} steps are left"
            show_plan(
                [("training", f"{said}, {parts} parts of {self.data.batch_size} items each; the losses of a discriminator are not in the figures")],
                works, how=how + ", with drawing its batch but without validation, previews and writing",
                memory=training_memory(device, size + 4 * trained), files=files, ranks=trainer.world_size,
            )  # fmt: skip

    def fit(self, export: Path | None) -> None:
        """Train, then export.

        Raises:
            KeyboardInterrupt: if the user has ended it; the last checkpoint stays what it was.
            InputError: if Lightning finds that its flags and the data do not fit.
        """
        check_folder(self.folder)
        if self.trainer.is_global_zero:
            with atomic_path(self.folder / "config.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(dict(self.content), sort_keys=False))
            for left_by_a_kill in (self.folder / "checkpoints").glob(".*.tmp.ckpt"):
                left_by_a_kill.unlink()
        try:
            self.trainer.fit(self.model, self.data, ckpt_path=self.resumed, weights_only=self.resumed is not None or None)
        except SystemExit:
            if self.trainer.interrupted:  # Lightning makes this of Ctrl-C
                raise KeyboardInterrupt from None
            raise
        except (MisconfigurationException, ValueError) as error:
            if not _is_lightnings(error):
                raise
            raise InputError(f"Lightning refused the run: {first_line(error)}") from None
        if export is not None and self.trainer.is_global_zero:
            self.model.export(export)
            print(f"weights, of the moving average where there is one -> {export}")


def build_experiment(
    content: Mapping[str, Any], folder: Path, flags: Mapping[str, Any], *, seed: int, scale_lr: bool, init_from: str | Path | None = None,
    resumed: Path | None = None, same: bool = False, loggers: Sequence[str] = (),
) -> Experiment:  # fmt: skip
    """Make data, model and trainer of a configuration.

    Args:
        content: sections model, data and lightning.
        flags: arguments of Lightning's Trainer, over those of the configuration.
        init_from: checkpoint whose weights a new run starts from, over the configuration's ckpt_path.
        resumed: checkpoint to go on from.
        same: refuse to go on with another configuration than the folder's.
        loggers: of `LOGGERS`, besides log.jsonl.

    Raises:
        InputError: for the first thing that is missing or does not fit.
    """
    hush()
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be 0..{2**32 - 1}, got {seed}")
    lightning = _section(content, "lightning")
    check_names("lightning", lightning, ("trainer", "callbacks", "modelcheckpoint"))
    options = modern(dict(lightning.get("trainer") or {})) | modern(dict(flags))
    content = {**content, "lightning": {**lightning, "trainer": dict(options)}, "run": {"seed": seed, "scale_lr": scale_lr}}
    if init_from is not None:
        content["run"]["init_from"] = str(init_from)
    step = 0 if resumed is None else _step_of(resumed)
    if same and resumed is not None:
        _check_same(content, folder)
    pl.seed_everything(seed, verbose=False)
    first_stage = trains_first_stage(content)
    config = read_autoencoder(content) if first_stage else read_model(content)
    autoencoder = load_autoencoder(config.first_stage, scale_factor=config.scale_factor) if isinstance(config, LDMConfig) else None
    data = _open_data(content, config, autoencoder, seed)
    if data.validation is None:
        options["limit_val_batches"] = 0
    log_every = options.setdefault("log_every_n_steps", 50)
    callbacks = [LossLog(folder / "log.jsonl", log_every), *_picture_logs(content, autoencoder, folder, data), *_checkpoints(content, config, folder, data)]
    trainer = _trainer(options, folder, callbacks, loggers)
    rate = config.base_learning_rate * (trainer.accumulate_grad_batches * trainer.world_size * data.batch_size if scale_lr else 1)
    model = FirstStageTraining(config, rate) if first_stage else LatentDiffusion(config, rate)
    monitor = config.training["monitor"]
    if data.validation is not None and monitor is not None and monitor not in model.validated:
        raise InputError(f"model.params.monitor is {monitor}; choose from {', '.join(model.validated)}")
    start = init_from or config.training["ckpt_path"]
    if start is not None and resumed is None:
        model.load_from(Path(start))
    if resumed is not None and 0 < trainer.max_steps < step:
        raise InputError(f"{resumed} is at step {step} already; pass a larger --max_steps")
    return Experiment(model, data, trainer, folder, content, resumed, step)


def _section(content: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A part of the configuration, {} where it is not there."""
    for name in names:
        content = content.get(name) or {}
        if not isinstance(content, Mapping):
            raise InputError(f"{'.'.join(names)} of the configuration must be a mapping, got {content}; take one of ldm/configs as a pattern")
    return content


def _open_data(content: Mapping[str, Any], config: LDMConfig | AutoencoderConfig, autoencoder: Autoencoder | None, seed: int) -> RunData:
    check_names("data", _section(content, "data"), ("target", "params"))
    said = _section(content, "data", "params")
    check_names("data.params", said, _DATA)
    said = _DATA | dict(said)
    if said["train"] is None:
        raise InputError("data.params needs train: {features: FOLDER} or train: {pictures: FOLDER, image_size: 256}; add it")
    if not isinstance(said["batch_size"], int) or said["batch_size"] < 1:
        raise InputError(f"data.params.batch_size must be a whole number of at least 1, got {said['batch_size']}")
    named = {part: said[part] for part in ("train", "validation") if said[part]}
    if isinstance(config, AutoencoderConfig):
        parts: dict[str, Any] = {part: open_pixels(source, part) for part, source in named.items()}
        size = config.params["ddconfig"]["resolution"]
        if wrong := [part for part in parts if parts[part].latent_shape[-1] != size]:
            raise InputError(f"ddconfig's resolution is {size}; pass data.params.{wrong[0]}.image_size={size}")
    else:
        parts = {part: open_latents(source, part, config.first_stage, autoencoder, config.latent_shape) for part, source in named.items()}
        if many := [part for part in parts if parts[part].num_classes > config.num_classes]:
            raise InputError(f"data.params.{many[0]} has {parts[many[0]].num_classes} classes, the class embedder {config.num_classes}; raise its n_classes")
    return RunData(parts["train"], parts.get("validation"), said["batch_size"], said["class_balance"], seed, autoencoder)


def modern(options: dict[str, Any]) -> dict[str, Any]:
    """`gpus` of Lightning 1 as accelerator and devices: a number of them (0 is the CPU), or their indices."""
    gpus = options.pop("gpus", None)
    if gpus is None:
        return options
    if options.get("accelerator") not in (None, "gpu", "cuda", "ddp") or "devices" in options:
        raise InputError("gpus is the old word for accelerator and devices; pass --accelerator gpu --devices N alone")
    if options.get("accelerator") == "ddp":  # Lightning 1 put the strategy there
        options["strategy"] = "ddp"
    if gpus in (0, "0"):
        return options | {"accelerator": "cpu", "devices": 1}
    return options | {"accelerator": "gpu", "devices": [int(k) for k in str(gpus).split(",") if k] if "," in str(gpus) else gpus}


def _picture_logs(content: Mapping[str, Any], autoencoder: Autoencoder | None, folder: Path, data: RunData) -> list[Callback]:
    callbacks = _section(content, "lightning", "callbacks")
    check_names("lightning.callbacks", callbacks, ("image_logger",))
    said = _section(content, "lightning", "callbacks", "image_logger")
    said = dict(said.get("params", {name: value for name, value in said.items() if name != "target"}))
    for old in ("clamp", "rescale"):
        said.pop(old, None)
    common = ("batch_frequency", "max_images", "increase_log_steps")
    check_names("image_logger", said, common if autoencoder is None else (*common, "num_steps", "cfg_scale"))
    for name in ("batch_frequency", "max_images", "num_steps"):
        if not isinstance(said.get(name, 1), int) or said.get(name, 1) < 1:
            raise InputError(f"image_logger's {name} must be a whole number of at least 1, got {said[name]}")
    if autoencoder is not None:
        return [ImageLogger(folder / "images", autoencoder, **said)]
    pictures: Pixels = data.validation or data.train
    return [ReconstructionLogger(folder / "images", pictures, **said)]


def _checkpoints(content: Mapping[str, Any], config: LDMConfig | AutoencoderConfig, folder: Path, data: RunData) -> list[Callback]:
    said = _section(content, "lightning", "modelcheckpoint")
    said = dict(said.get("params", {name: value for name, value in said.items() if name != "target"}))
    check_names("modelcheckpoint", said, _CHECKPOINTS)
    said = _CHECKPOINTS | said
    if not isinstance(said["every_n_train_steps"], int) or said["every_n_train_steps"] < 1:
        raise InputError(f"modelcheckpoint's every_n_train_steps must be a whole number of at least 1, got {said['every_n_train_steps']}")
    last = LastCheckpoint(folder / "checkpoints", said["every_n_train_steps"])
    if config.training["monitor"] is None or data.validation is None:
        return [last]
    best = ModelCheckpoint(
        folder / "checkpoints", "{epoch:06d}-{step:07d}", config.training["monitor"], save_top_k=said["save_top_k"], mode=said["mode"],
        save_on_train_epoch_end=False, enable_version_counter=False,
    )  # fmt: skip
    return [best, last]  # in this order: the last one knows which are the best


def _trainer(options: Mapping[str, Any], folder: Path, callbacks: list[Callback], loggers: Sequence[str]) -> pl.Trainer:
    if any(word in str(options.get("strategy")) for word in ("fsdp", "deepspeed", "model_parallel")):
        raise InputError(f"strategy {options['strategy']} cuts the model to pieces, which a checkpoint under CompVis' names does not hold; choose ddp")
    chosen = [_logger(name, folder) for name in loggers] or False
    bar = [TQDMProgressBar(refresh_rate=20)] if options.get("enable_progress_bar", True) else []
    try:
        return pl.Trainer(
            default_root_dir=folder, callbacks=bar + callbacks, logger=chosen, enable_model_summary=False,
            plugins=[AtomicCheckpointIO()], **(_TRAINER | dict(options)),
        )  # fmt: skip
    except (TypeError, ValueError, RuntimeError, AssertionError, MisconfigurationException) as error:
        raise InputError(f"Lightning's Trainer refused its flags: {first_line(error)}") from None


def _is_lightnings(error: Exception) -> bool:
    """Whether Lightning itself raised it, no code that it called."""
    raised = error.__traceback__
    while raised.tb_next is not None:
        raised = raised.tb_next
    return raised.tb_frame.f_globals.get("__name__", "").startswith(("pytorch_lightning", "lightning_fabric"))


def _logger(name: str, folder: Path) -> Logger:
    try:
        if name == "wandb":
            return WandbLogger(name=folder.name, save_dir=folder, id=folder.name, resume="allow")
        return CSVLogger(folder, "csv") if name == "csv" else TensorBoardLogger(folder, "tensorboard", version="")
    except ModuleNotFoundError:
        raise InputError(f"--logger {name} needs the package {name}; install it with pip install {name}") from None


def _step_of(checkpoint: Path) -> int:
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError):
        others = sorted(path for path in checkpoint.parent.glob("*.ckpt") if path != checkpoint)
        instead = f"pass --resume {others[-1]}" if others else "remove the run's folder"
        raise InputError(f"{checkpoint} is damaged or no training checkpoint; {instead}") from None


def _check_same(content: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with other values than a run was begun with."""
    path = folder / "config.yaml"
    if not path.is_file():
        return
    was = yaml.safe_load(path.read_text())
    before, now = (_flat(part) for part in ({"run": content["run"]} | was, content))
    differ = [
        f"{name}={before.get(name)!r:.60}" for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name) and name not in _MAY_DIFFER
    ]
    if differ:
        raise InputError(f"{folder} was begun with {', '.join(differ[:4])}; pass the same values, another --run-dir, or --resume {folder} to change them")


def _flat(content: object, name: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(content, Mapping):
        return {name: content}
    return {key: value for part, inside in content.items() for key, value in _flat(inside, f"{name}.{part}" if name else str(part)).items()}
