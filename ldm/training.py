"""Training a U-Net with Lightning, so that a run that was killed goes on to the same weights.

What a batch holds, and all that is drawn for it, depends on (seed, step, part) alone, as in `tstitch.training`; a part is what one process computes at
once. Checkpoints hold the model under CompVis' names, so `ldm.checkpoints`, our scripts and CompVis' own code read them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.checkpoints import LDMCheckpoint, compvis_state_dict, load_compvis
from ldm.config import LR_SCHEDULES, LDMConfig
from ldm.denoiser import LatentDenoiser
from ldm.losses import p_losses
from ldm.networks import build_ldm_unet
from ldm.sampling import ldm_diffusion
from tstitch.data import Features
from tstitch.errors import InputError
from tstitch.training import EMA, cosine_lr, draw_batch, local, snr_weights, step_seed

Batch = tuple[Tensor, Tensor, int]  # latents (n, C, h, w), labels (n,), seed of what is drawn besides


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
        done = self.module.steps_done
        for step in range(done, (done // self.steps + 1) * self.steps):
            for k in range(self.accumulation):
                part = self.module.trainer.global_rank * self.accumulation + k
                with torch.random.fork_rng(devices=[]):  # a batch is drawn ahead, while the one before is being learned
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


class LatentDiffusion(pl.LightningModule):
    """A class-conditional U-Net in training: noise prediction, label dropout, moving average of the U-Net (not of the class embedder, as in LDM).

    Args:
        config: of one U-Net.
        learning_rate: peak.

    Raises:
        InputError: if the configuration holds a pair, or an unknown learning-rate schedule.
    """

    def __init__(self, config: LDMConfig, learning_rate: float) -> None:
        super().__init__()
        if len(config.unets) != 1:
            raise InputError("a stitched pair is not trained as one; train each U-Net with its own configuration")
        schedule = config.training["scheduler_config"]
        if schedule is not None and str(schedule.get("target")).rsplit(".", 1)[-1] not in LR_SCHEDULES:
            raise InputError(f"unknown learning-rate schedule {schedule.get('target')}; choose from {', '.join(LR_SCHEDULES)}")
        self.config, self.learning_rate = config, learning_rate
        table = config.embedders[0]
        self.label_dropout = float(table.get("ucg_rate", 0))
        embedder = nn.Embedding(table.get("n_classes", 1000), table["embed_dim"])
        embedder.requires_grad_(config.training["cond_stage_trainable"])
        self.denoiser = LatentDenoiser(build_ldm_unet(config.unets[0]), embedder, config.num_classes)
        self.average = copy.deepcopy(self.denoiser.unet).requires_grad_(False) if config.training["use_ema"] else None
        self.diffusion = ldm_diffusion(None, **config.betas)
        logvar = torch.full((self.diffusion.num_timesteps,), float(config.training["logvar_init"]))
        self.logvar = nn.Parameter(logvar, requires_grad=config.training["learn_logvar"])
        self.register_buffer("loss_weights", snr_weights(self.diffusion.alphas_cumprod, config.training["snr_gamma"]), persistent=False)
        self._ema: EMA | None = None

    @property
    def steps_done(self) -> int:
        """Optimizer steps."""
        return self.trainer.global_step

    @property
    def averaged(self) -> LatentDenoiser:
        """The denoiser with the moving average of its U-Net, where there is one."""
        if self.average is None:
            return self.denoiser
        return LatentDenoiser(self.average, self.denoiser.embedder, self.denoiser.num_classes)

    def losses(self, denoiser: LatentDenoiser, batch: Batch) -> dict[str, Tensor]:
        """Loss and its parts, scalars, of a batch, whose timesteps, noise and dropped labels come from its seed."""
        x_0, y, seed = batch
        generator = torch.Generator().manual_seed(seed)  # on the CPU: other devices would draw other numbers
        t = torch.randint(self.diffusion.num_timesteps, y.shape, generator=generator).to(y.device)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
        dropped = torch.rand(y.shape, generator=generator).to(y.device) < self.label_dropout
        said = self.config.training
        terms = p_losses(
            self.diffusion, denoiser, x_0, t, torch.where(dropped, denoiser.num_classes, y), noise, said["loss_type"], self.logvar,
            said["l_simple_weight"], said["original_elbo_weight"],
        )  # fmt: skip
        loss = terms["loss"] if said["snr_gamma"] is None else (self.loss_weights[t] * terms["per_sample"]).mean()
        return {"loss": loss, "loss_simple": terms["loss_simple"], "loss_vlb": terms["loss_vlb"]}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Loss of a part, and what `ldm.callbacks.LossLog` writes."""
        terms = self.losses(self.denoiser, batch)
        logged = {name: value.detach() for name, value in terms.items()}
        self.log("loss", logged["loss_simple"], prog_bar=True, logger=False)
        return {"loss": terms["loss"], "terms": logged}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the model and of its moving average on the same draws."""
        for suffix, denoiser in (("", self.denoiser), ("_ema", self.averaged)):
            terms = self.losses(denoiser, batch)
            self.log_dict({f"val/{name}{suffix}": value for name, value in terms.items()}, batch_size=len(batch[1]), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the U-Net and, where they are trained, the class embedder and the log variances."""
        said = self.config.training
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, betas=tuple(said["adam_betas"]), weight_decay=said["weight_decay"])
        schedule = (said["scheduler_config"] or {}).get("params", {})
        if not schedule:
            return {"optimizer": optimizer}
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_lr(step, schedule["max_decay_steps"], schedule.get("warm_up_steps", 0)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    def on_train_start(self) -> None:
        """Tie the moving average to its parameters, which are on their device now."""
        if self.average is not None:
            self._ema = EMA(self.denoiser.unet, self.config.training["ema_decay"])
            self._ema.average = [local(parameter) for parameter in self.average.parameters()]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  (Lightning's own)
        """Step, then move the average; LDM counts its updates from 1."""
        step = self.trainer.global_step
        super().optimizer_step(*args, **kwargs)
        if self._ema is not None:
            self._ema.update(self.denoiser.unet, step + 1)

    def published_state(self) -> dict[str, Tensor]:
        """The model as a LatentDiffusion state dict of CompVis, without first stage."""
        ema = [] if self.average is None else [compvis_state_dict(self.average)]
        buffers = {"logvar": self.logvar.detach()} if self.config.training["learn_logvar"] else {}
        if ema:
            buffers |= {"model_ema.decay": torch.tensor(self.config.training["ema_decay"]), "model_ema.num_updates": torch.tensor(self.steps_done).int()}
        table = {"embedding.weight": self.denoiser.embedder.weight.detach()}
        return LDMCheckpoint([compvis_state_dict(self.denoiser.unet)], ema, [table], {}, buffers).state_dict()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write CompVis' names."""
        checkpoint["state_dict"] = self.published_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read CompVis' names."""
        self.load_published(LDMCheckpoint.from_state_dict(checkpoint["state_dict"]))
        checkpoint["state_dict"] = self.state_dict()  # what Lightning itself loads next

    def load_published(self, parts: LDMCheckpoint, source: str = "the checkpoint") -> None:
        """Take the weights of a LatentDiffusion checkpoint: to go on, or to start from.

        Raises:
            InputError: if it is of another model.
        """
        load_compvis(self.denoiser.unet, parts.unet(0, "model"), source).train()
        if self.average is not None:
            load_compvis(self.average, parts.unet(0), source)
        if [len(table["embedding.weight"]) for table in parts.embedders] != [self.denoiser.embedder.num_embeddings]:
            raise InputError(f"{source} has another number of classes than cond_stage_config says; pass its own configuration")
        with torch.no_grad():
            self.denoiser.embedder.weight.copy_(parts.embedders[0]["embedding.weight"])
            if "logvar" in parts.buffers:
                self.logvar.copy_(parts.buffers["logvar"])
