"""What watches a training run: a log of its losses that a resume continues, pictures, and checkpoints that appear whole."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import Strategy
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ldm.data import Pixels
from ldm.sampling import ldm_diffusion
from tstitch.autoencoder import Autoencoder, to_uint8
from tstitch.files import atomic_path
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.noise import SampleNoise
from tstitch.plots import contact_sheet, save_image
from tstitch.sampling import sample
from tstitch.schedule import StitchSchedule
from tstitch.solvers import DDIM
from tstitch.training import JsonLines

COLUMNS = 8  # of sheets


class LossLog(Callback):
    """Writes the mean of every term that `training_step` returns under "terms" into log.jsonl, every `every` steps, and what validation measures.

    A resumed run writes the same lines, since the sums are part of a checkpoint.
    """

    def __init__(self, path: Path, every: int = 50) -> None:
        self.path, self.every = path, every
        self.count, self.sums = 0, {}
        self._log: JsonLines | None = None
        self._strategy: Strategy | None = None
        self._since = self._rated = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last line, the mean of all processes: Lightning asks every one, and writes what the first one says."""
        reduce = (lambda value: value) if self._strategy is None else (lambda value: self._strategy.reduce(value.clone(), reduce_op="mean"))
        return {"count": self.count, "sums": {name: reduce(value) for name, value in self.sums.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint."""
        self.count, self.sums = state_dict["count"], dict(state_dict["sums"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the log where the run is."""
        self._strategy = trainer.strategy
        self._log = JsonLines(self.path, pl_module.steps_done) if trainer.is_global_zero else None
        self._since, self._rated = time.perf_counter(), pl_module.steps_done
        self.sums = {name: value.to(pl_module.device) for name, value in self.sums.items()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Add a part; write a line when a step is done that asks for one."""
        for name, value in outputs["terms"].items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1
        step = pl_module.steps_done
        if step % self.every and step != trainer.max_steps or not _ends_a_step(trainer, batch_idx):
            return
        row = {name: float(trainer.strategy.reduce(value, reduce_op="mean")) / self.count for name, value in self.sums.items()}
        now = time.perf_counter()
        rates = {"lr": trainer.optimizers[0].param_groups[0]["lr"], "steps_per_s": (step - self._rated) / (now - self._since)}
        self._write(trainer, step, row | rates)
        for logger in trainer.loggers:
            logger.log_metrics(row | rates, step)
        self.count, self.sums, self._since, self._rated = 0, {}, now, step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a line of what was measured; Lightning gives it to its loggers itself."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module.steps_done, {name: float(trainer.callback_metrics[name]) for name in pl_module.validated})

    def _write(self, trainer: pl.Trainer, step: int, row: Mapping[str, float]) -> None:
        if self._log is not None:
            self._log.write({"step": step, **{name: float(f"{value:.6g}") for name, value in row.items()}})


def _ends_a_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class LastCheckpoint(Checkpoint):
    """Keeps folder/last.ckpt: after every `every` steps and at the end, after the validation that may belong to that step.

    So a run that goes on from it has nothing to measure twice, and nothing that was left out. Where time ends a run between the parts of a step, the step
    is done first: a checkpoint has no place for half of its gradient.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.path, self.every = folder / "last.ckpt", every
        self._saved, self._due, self._stops = -1, False, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know the step of the file that is there."""
        self._saved = pl_module.steps_done

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Save, or wait for the validation that comes next."""
        step, whole = pl_module.steps_done, _ends_a_step(trainer, batch_idx)
        self._stops = self._stops or trainer.should_stop
        trainer.should_stop = self._stops and whole
        if (step % self.every and step != trainer.max_steps) or not whole:
            return
        loop = trainer.fit_loop
        self._due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # what Lightning asks next
        if not self._due:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what waited."""
        if self._due:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of a run that epochs or time have ended."""
        if pl_module.steps_done != self._saved:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved, self._due = trainer.global_step, False
        if not trainer.fast_dev_run:
            trainer.save_checkpoint(self.path)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames: Lightning's own way goes through the temporary folder, which may be on another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:  # noqa: ANN401
        """Write a checkpoint."""
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)


class PictureLog(Callback):
    """Draws a sheet into folder/{step:07d}.png.

    Args:
        batch_frequency: steps between two sheets.
        max_images: pictures of a sheet.
        increase_log_steps: draw after 1, 2, 4, ... steps as well.
    """

    def __init__(self, folder: Path, batch_frequency: int = 5000, max_images: int = 8, increase_log_steps: bool = False) -> None:
        self.folder, self.batch_frequency, self.max_images, self.increase_log_steps = folder, batch_frequency, max_images, increase_log_steps
        self._drawn = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Draw, where it is time to."""
        step = pl_module.steps_done
        power_of_two = step & (step - 1) == 0 and step < self.batch_frequency
        if trainer.is_global_zero and step != self._drawn and (step % self.batch_frequency == 0 or (self.increase_log_steps and power_of_two)):
            self._drawn = step
            pl_module.eval()
            with torch.no_grad():
                sheet = self.pictures(pl_module)
            pl_module.train()
            save_image(self.folder / f"{step:07d}.png", contact_sheet(sheet, f"step {step}", columns=min(COLUMNS, self.max_images)))

    @abstractmethod
    def pictures(self, module: Any) -> Tensor:  # noqa: ANN401  (the LightningModule in training, in eval mode)
        """Pictures of a sheet, uint8 (n, 3, H, W)."""


class ImageLogger(PictureLog):
    """Draws samples of the moving average; picture i has seed i and label i modulo the number of classes.

    Args:
        num_steps: DDIM steps.
        cfg_scale: guidance, where the model has learned a null label.
        options: those of `PictureLog`.
    """

    def __init__(self, folder: Path, autoencoder: Autoencoder, num_steps: int = 20, cfg_scale: float = 2.0, **options: Any) -> None:  # noqa: ANN401
        super().__init__(folder, **options)
        self.autoencoder, self.num_steps, self.cfg_scale = autoencoder, num_steps, cfg_scale

    def pictures(self, module: Any) -> Tensor:  # noqa: ANN401  (ldm.training.LatentDiffusion)
        """Sample."""
        denoiser, device = module.averaged, module.device
        noise, y = SampleNoise(range(self.max_images)), torch.arange(self.max_images, device=device) % denoiser.num_classes
        guidance = ClassifierFreeGuidance(self.cfg_scale if denoiser.has_null_label else 1.0, denoiser.num_classes, None)
        solver = DDIM(ldm_diffusion(self.num_steps, **module.config.betas))
        latents = sample(
            [denoiser], noise.latents(denoiser.latent_shape, device), y, schedule=StitchSchedule((1.0,)), solver=solver, guidance=guidance, noise=noise
        )  # fmt: skip
        return self.autoencoder.decode(latents)


class ReconstructionLogger(PictureLog):
    """Draws pictures, each row above its reconstructions by the moving average; the pictures are spread over `data`.

    Args:
        options: those of `PictureLog`.
    """

    def __init__(self, folder: Path, data: Pixels, **options: Any) -> None:  # noqa: ANN401
        super().__init__(folder, **options)
        self.max_images = min(self.max_images, len(data))
        index = torch.arange(self.max_images) * len(data) // self.max_images
        self.images = data.read(index, torch.zeros(len(index), dtype=torch.bool))

    def pictures(self, module: Any) -> Tensor:  # noqa: ANN401  (ldm.first_stage_training.FirstStageTraining)
        """Reconstruct."""
        rows = []
        for x in self.images.split(COLUMNS):
            x_hat, _ = module.reconstruct(module.averaged, x.to(module.device))
            rows += [x, x_hat.float().cpu()]
        return to_uint8(pad_sequence(rows, batch_first=True, padding_value=1.0).flatten(0, 1))  # a last row that is short ends in white
