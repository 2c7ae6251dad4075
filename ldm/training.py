"""Training with Lightning, so that a run that was killed goes on to the same weights.

What a batch holds, and all that is drawn for it, depends on (seed, step, part) alone, as in `tstitch.training`; a part is what one process computes at
once. Checkpoints hold the model under CompVis' names, so `ldm.checkpoints`, our scripts and CompVis' own code read them.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.checkpoints import LDMCheckpoint, compvis_state_dict, load_compvis, read_ldm
from ldm.config import LR_SCHEDULES, LDMConfig, check_names
from ldm.data import Batch
from ldm.denoiser import LatentDenoiser
from ldm.losses import p_losses
from ldm.networks import build_ldm_unet
from ldm.sampling import ldm_diffusion
from tstitch.checkpoints import save_weights
from tstitch.errors import InputError
from tstitch.training import EMA, cosine_lr, local, snr_weights


def lr_factor(schedule: Mapping[str, Any] | None) -> Callable[[int], float] | None:
    """Factor on the learning rate at a step, of a yaml's scheduler_config; None keeps it constant.

    Raises:
        InputError: naming what is unknown or missing.
    """
    if schedule is None:
        return None
    if str(schedule.get("target")).rsplit(".", 1)[-1] not in LR_SCHEDULES:
        raise InputError(f"unknown learning-rate schedule {schedule.get('target')}; choose from {', '.join(LR_SCHEDULES)}")
    params = schedule.get("params") or {}
    check_names("scheduler_config", params, ("max_decay_steps", "warm_up_steps", "lr_max", "lr_min", "verbosity_interval"))
    if "max_decay_steps" not in params:
        raise InputError("scheduler_config lacks max_decay_steps, where the cosine ends; add it to its params")
    steps, warm_up, peak, floor = (params.get(name, default) for name, default in (("max_decay_steps", 0), ("warm_up_steps", 0), ("lr_max", 1), ("lr_min", 0)))
    return lambda step: peak * cosine_lr(step, steps, warm_up, floor / peak)


class CompVisModule(pl.LightningModule):
    """What U-Nets and first stages have in common in training: AdamW with its schedule, the moving average, and losses of both on held-out data.

    A subclass has `network`, diffusers' network that is averaged, and `average`, its copy or None.

    Args:
        said: `training` of the configuration.
        learning_rate: peak.
        judged: names of the terms that validation measures, as "val/{name}", and of the moving average as "val/{name}_ema".
    """

    network: nn.Module
    average: nn.Module | None
    averaged: nn.Module
    """The model with the moving average in place of its network, where there is one."""

    def __init__(self, said: Mapping[str, Any], learning_rate: float, judged: tuple[str, ...]) -> None:
        super().__init__()
        self.said, self.learning_rate = said, learning_rate
        suffixes = ("", "_ema") if said["use_ema"] else ("",)
        self.validated = [f"val/{name}{suffix}" for suffix in suffixes for name in judged]
        self._factor = lr_factor(said["scheduler_config"])
        self._ema: EMA | None = None

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Terms, scalars, of a model on a batch, whose draws come from the batch's seed."""

    @abstractmethod
    def judge(self) -> list[tuple[str, nn.Module]]:
        """Models that validation measures, with the ends of their terms' names."""

    @abstractmethod
    def load_from(self, path: Path) -> None:
        """Start from the weights of a checkpoint.

        Raises:
            InputError: if it is of another model.
        """

    @abstractmethod
    def export(self, path: Path) -> None:
        """Write the moving average as fp16 safetensors under CompVis' names."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps."""
        return self.trainer.global_step

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer learns."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over what is trained, with the schedule of the configuration."""
        betas, decay = tuple(self.said["adam_betas"]), self.said["weight_decay"]
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.learning_rate, betas=betas, weight_decay=decay)
        if self._factor is None:
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor), "interval": "step"}}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of the model and of its moving average on the same draws."""
        for suffix, model in self.judge():
            terms = {f"val/{name}{suffix}": value for name, value in self.losses(model, batch).items()}
            self.log_dict({name: terms[name] for name in self.validated if name in terms}, batch_size=len(batch[1]), sync_dist=True)

    def on_train_start(self) -> None:
        """Tie the moving average to its parameters, which are on their device now."""
        if self.average is not None:
            self._ema = EMA(self.network, self.said["ema_decay"])
            self._ema.average = [local(parameter) for parameter in self.average.parameters()]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  (Lightning's own)
        """Step, then move the average; LDM counts its updates from 1."""
        step = self.steps_done
        super().optimizer_step(*args, **kwargs)
        if self._ema is not None:
            self._ema.update(self.network, step + 1)

    def average_of(self, network: nn.Module) -> nn.Module | None:
        """A copy for the moving average, where the configuration asks for one."""
        return copy.deepcopy(network).requires_grad_(False) if self.said["use_ema"] else None


class LatentDiffusion(CompVisModule):
    """A class-conditional U-Net in training: noise prediction, label dropout, moving average of the U-Net (not of the class embedder, as in LDM).

    Args:
        config: of one U-Net.
        learning_rate: peak.

    Raises:
        InputError: if the configuration holds a pair, or an unknown learning-rate schedule.
    """

    def __init__(self, config: LDMConfig, learning_rate: float) -> None:
        super().__init__(config.training, learning_rate, ("loss_simple", "loss_vlb", "loss"))
        if len(config.unets) != 1:
            raise InputError("a stitched pair is not trained as one; train each U-Net with its own configuration")
        self.config = config
        table = config.embedders[0]
        self.label_dropout = float(table.get("ucg_rate", 0))
        embedder = nn.Embedding(table.get("n_classes", 1000), table["embed_dim"])
        embedder.requires_grad_(self.said["cond_stage_trainable"])
        self.denoiser = LatentDenoiser(build_ldm_unet(config.unets[0]), embedder, config.num_classes)
        self.average = self.average_of(self.network)
        self.diffusion = ldm_diffusion(None, **config.betas)
        logvar = torch.full((self.diffusion.num_timesteps,), float(self.said["logvar_init"]))
        self.logvar = nn.Parameter(logvar, requires_grad=self.said["learn_logvar"])
        self.register_buffer("loss_weights", snr_weights(self.diffusion.alphas_cumprod, self.said["snr_gamma"]), persistent=False)

    @property
    def network(self) -> nn.Module:
        """The U-Net."""
        return self.denoiser.unet

    @property
    def averaged(self) -> LatentDenoiser:
        """The denoiser with the moving average of its U-Net, where there is one."""
        if self.average is None:
            return self.denoiser
        return LatentDenoiser(self.average, self.denoiser.embedder, self.denoiser.num_classes)

    def judge(self) -> list[tuple[str, nn.Module]]:
        """See `CompVisModule`."""
        return [("", self.denoiser)] + [("_ema", self.averaged)] * (self.average is not None)

    def losses(self, model: LatentDenoiser, batch: Batch) -> dict[str, Tensor]:
        """Loss and its parts of a batch: its seed gives timesteps, noise and, in training, dropped labels."""
        x_0, y, seed = batch
        generator = torch.Generator().manual_seed(seed)  # on the CPU: other devices would draw other numbers
        t = torch.randint(self.diffusion.num_timesteps, y.shape, generator=generator).to(y.device)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
        if self.training:
            dropped = torch.rand(y.shape, generator=generator).to(y.device) < self.label_dropout
            y = torch.where(dropped, model.num_classes, y)
        said = self.said
        terms = p_losses(
            self.diffusion, model, x_0, t, y, noise, said["loss_type"], self.logvar, said["l_simple_weight"], said["original_elbo_weight"]
        )  # fmt: skip
        loss = terms["loss"] if said["snr_gamma"] is None else (self.loss_weights[t] * terms["per_sample"]).mean()
        return {"loss": loss, "loss_simple": terms["loss_simple"], "loss_vlb": terms["loss_vlb"]}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Loss of a part, and what `ldm.callbacks.LossLog` writes."""
        torch.manual_seed(batch[2])  # for a U-Net with dropout
        terms = self.losses(self.denoiser, batch)
        logged = {name: value.detach() for name, value in terms.items()}
        self.log("loss", logged["loss_simple"], prog_bar=True, logger=False)
        return {"loss": terms["loss"], "terms": logged}

    def published_state(self) -> dict[str, Tensor]:
        """The model as a LatentDiffusion state dict of CompVis, without first stage."""
        ema = [] if self.average is None else [compvis_state_dict(self.average)]
        buffers = {"logvar": self.logvar.detach()} if self.said["learn_logvar"] else {}
        if ema:
            buffers |= {"model_ema.decay": torch.tensor(self.said["ema_decay"]), "model_ema.num_updates": torch.tensor(self.steps_done).int()}
        table = {"embedding.weight": self.denoiser.embedder.weight.detach()}
        return LDMCheckpoint([compvis_state_dict(self.network)], ema, [table], {}, buffers).state_dict()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write CompVis' names."""
        checkpoint["state_dict"] = self.published_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read CompVis' names."""
        self._load(LDMCheckpoint.from_state_dict(checkpoint["state_dict"]), "the checkpoint")
        checkpoint["state_dict"] = self.state_dict()  # what Lightning itself loads next

    def load_from(self, path: Path) -> None:
        """See `CompVisModule`; of a LatentDiffusion checkpoint with a moving average both are taken."""
        self._load(read_ldm(path), str(path))

    def _load(self, parts: LDMCheckpoint, source: str) -> None:
        if len(parts.unets) != 1:
            raise InputError(f"{source} holds {len(parts.unets)} U-Nets; pass a checkpoint of one")
        load_compvis(self.network, parts.unet(0, "model"), source).train()
        if self.average is not None:
            load_compvis(self.average, parts.unet(0), source)
        tables = [table["embedding.weight"] for table in parts.embedders]
        if [table.shape for table in tables] != [self.denoiser.embedder.weight.shape]:
            had = ", ".join(str(list(table.shape)) for table in tables) or "none"
            raise InputError(f"{source} has class embeddings {had}, cond_stage_config says {list(self.denoiser.embedder.weight.shape)}; pass its own")
        with torch.no_grad():
            self.denoiser.embedder.weight.copy_(tables[0])
            if "logvar" in parts.buffers:
                self.logvar.copy_(parts.buffers["logvar"])

    def export(self, path: Path) -> None:
        """See `CompVisModule`; the class embedder too, the U-Net's `params` in the header."""
        denoiser = self.averaged
        state = LDMCheckpoint([compvis_state_dict(denoiser.unet)], [], [{"embedding.weight": denoiser.embedder.weight}]).state_dict()
        save_weights(path, state, {"unet": dict(self.config.unets[0]), "num_classes": self.config.num_classes})
