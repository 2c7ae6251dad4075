"""What watches a training run: a log of its losses that a resume continues, and pictures of its moving average."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.sampling import ldm_diffusion
from tstitch.autoencoder import Autoencoder
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.noise import SampleNoise
from tstitch.plots import contact_sheet, save_image
from tstitch.sampling import sample
from tstitch.schedule import StitchSchedule
from tstitch.solvers import DDIM
from tstitch.training import JsonLines


class LossLog(Callback):
    """Writes the mean of every term that `training_step` returns under "terms" into log.jsonl, every `every` steps.

    A resumed run writes the same lines, since the sums are part of a checkpoint.
    """

    def __init__(self, path: Path, every: int = 50) -> None:
        self.path, self.every = path, every
        self.count, self.sums = 0, {}
        self._log: JsonLines | None = None
        self._since = self._rated = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last line."""
        return {"count": self.count, "sums": dict(self.sums)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint."""
        self.count, self.sums = state_dict["count"], dict(state_dict["sums"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the log where the run is."""
        self._log = JsonLines(self.path, pl_module.steps_done) if trainer.is_global_zero else None
        self._since, self._rated = time.perf_counter(), pl_module.steps_done
        self.sums = {name: value.to(pl_module.device) for name, value in self.sums.items()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Add a part; write a line when a step is done that asks for one."""
        for name, value in outputs["terms"].items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1
        step = pl_module.steps_done
        if step % self.every and step != trainer.max_steps or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        row = {name: float(trainer.strategy.reduce(value, reduce_op="mean")) / self.count for name, value in self.sums.items()}
        now = time.perf_counter()
        rate = (step - self._rated) / (now - self._since)
        if self._log is not None:
            rates = {"lr": trainer.optimizers[0].param_groups[0]["lr"], "steps_per_s": rate}
            self._log.write({"step": step, **{name: float(f"{value:.6g}") for name, value in (row | rates).items()}})
        self.count, self.sums, self._since, self._rated = 0, {}, now, step


class ImageLogger(Callback):
    """Draws pictures of the moving average into folder/{step:07d}.png; picture i has seed i and label i modulo the number of classes.

    Args:
        batch_frequency: steps between two sheets.
        max_images: pictures of a sheet.
        increase_log_steps: draw after 1, 2, 4, ... steps as well.
        num_steps: DDIM steps.
        cfg_scale: guidance, where the model has learned a null label.
    """

    def __init__(
        self, folder: Path, autoencoder: Autoencoder, batch_frequency: int = 5000, max_images: int = 8, increase_log_steps: bool = False,
        num_steps: int = 20, cfg_scale: float = 2.0,
    ) -> None:  # fmt: skip
        self.folder, self.autoencoder, self.batch_frequency, self.max_images = folder, autoencoder, batch_frequency, max_images
        self.increase_log_steps, self.num_steps, self.cfg_scale = increase_log_steps, num_steps, cfg_scale
        self._drawn = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Draw, where it is time to."""
        step = pl_module.steps_done
        power_of_two = step & (step - 1) == 0 and step < self.batch_frequency
        if trainer.is_global_zero and step != self._drawn and (step % self.batch_frequency == 0 or (self.increase_log_steps and power_of_two)):
            self._drawn = step
            self.draw(pl_module, step)

    @torch.no_grad()
    def draw(self, module: Any, step: int) -> None:  # noqa: ANN401  (ldm.training.LatentDiffusion)
        """Sample and save one sheet."""
        denoiser, device = module.averaged, module.device
        noise, y = SampleNoise(range(self.max_images)), torch.arange(self.max_images, device=device) % denoiser.num_classes
        guidance = ClassifierFreeGuidance(self.cfg_scale if denoiser.has_null_label else 1.0, denoiser.num_classes, None)
        solver = DDIM(ldm_diffusion(self.num_steps, **module.config.betas))
        module.eval()
        latents = sample(
            [denoiser], noise.latents(denoiser.latent_shape, device), y, schedule=StitchSchedule((1.0,)), solver=solver, guidance=guidance, noise=noise
        )  # fmt: skip
        module.train()
        save_image(self.folder / f"{step:07d}.png", contact_sheet(self.autoencoder.decode(latents), f"step {step}", columns=8))
