"""Training runs of tiny U-Nets and first stages, as ldm/main.py takes them: their data, their configurations, an experiment of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from assets.emoji.emoji_data import load_drawings
from ldm.experiment import Experiment, build_experiment
from tstitch.data import write_features
from tstitch.presets import ROOT

UNET = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [], "num_res_blocks": 1, "channel_mult": [1],
    "num_heads": 2, "use_spatial_transformer": True, "context_dim": 8,
}  # fmt: skip
DDCONFIG = {
    "double_z": False, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
    "attn_resolutions": [], "attn_type": "none",
}  # fmt: skip
LOSS = {"disc_start": 3, "perceptual_weight": 0.0, "disc_num_layers": 1, "disc_ndf": 8}


def write_run_features(folder: Path) -> Path:
    """Twenty-six items of three unequal classes; their latents are nearly constant."""
    labels = np.repeat([0, 1, 2], [13, 8, 5])
    mean = np.broadcast_to((labels - 1.0)[:, None, None, None], (26, 4, 8, 8))
    moments = np.concatenate([mean, np.full_like(mean, -8.0)], axis=1)[:, None]
    write_features(folder, moments, labels, num_classes=3, vae="none", scaling_factor=1.0)
    return folder


def write_run_pictures(folder: Path) -> Path:
    """Ten emoji in two folders."""
    for k, image in enumerate(load_drawings(ROOT / "assets" / "emoji" / "sample64.npz", held_out=False).images[:10]):
        (folder / str(k % 2)).mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / str(k % 2) / f"{k}.png")
    return folder


def unet_run(features: Path, **trainer: Any) -> dict[str, Any]:
    """A configuration of three steps an epoch; validation after each, a checkpoint every two."""
    params = {
        "linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 8, "channels": 4, "monitor": "val/loss_simple_ema",
        "scheduler_config": {"target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler", "params": {"warm_up_steps": 3, "max_decay_steps": 40}},
        "unet_config": {"target": "ldm.UNetModel", "params": UNET},
        "first_stage_config": {"target": "tstitch.autoencoder.Autoencoder", "params": {"ckpt_path": "pretrained_models/emoji/vae"}},
        "cond_stage_config": {"target": "ldm.ClassEmbedder", "params": {"embed_dim": 8, "n_classes": 4, "ucg_rate": 0.25}},
    }  # fmt: skip
    data = {"batch_size": 4, "class_balance": 0.5, "train": {"features": str(features)}, "validation": {"features": str(features)}}
    return _configuration({"base_learning_rate": 1e-4, "target": "ldm.LatentDiffusion", "params": params}, data, trainer)


def first_stage_run(pictures: Path, kind: str, **trainer: Any) -> dict[str, Any]:
    """A configuration of a VQ or KL first stage whose discriminator begins at step 3."""
    names = {"vq": ("VQModel", "VQLPIPSWithDiscriminator"), "kl": ("AutoencoderKL", "LPIPSWithDiscriminator")}[kind]
    params = {
        "embed_dim": 4, "ddconfig": DDCONFIG | {"double_z": kind == "kl"}, "use_ema": True, "monitor": "val/rec_loss",
        "lossconfig": {"target": f"ldm.{names[1]}", "params": LOSS | ({"kl_weight": 1e-6} if kind == "kl" else {})},
    } | ({"n_embed": 16} if kind == "vq" else {})  # fmt: skip
    source = {"pictures": str(pictures), "image_size": 32}
    model = {"base_learning_rate": 1.25e-4, "target": f"ldm.models.autoencoder.{names[0]}", "params": params}
    return _configuration(model, {"batch_size": 2, "train": source, "validation": source}, trainer)


def _configuration(model: dict, data: dict, trainer: dict) -> dict[str, Any]:
    common = {"accelerator": "cpu", "max_steps": 7, "log_every_n_steps": 2, "accumulate_grad_batches": 2, "enable_progress_bar": False}
    lightning = {"modelcheckpoint": {"params": {"every_n_train_steps": 2}}, "trainer": common | trainer}
    return {"model": model, "data": {"params": data}, "lightning": lightning}


def saved(path: Path, content: dict[str, Any]) -> str:
    """Path of a yaml with this content."""
    path.write_text(yaml.safe_dump(content))
    return str(path)


def build(content: dict[str, Any], folder: Path, **options: Any) -> Experiment:
    """An experiment of a configuration, with the script's own defaults."""
    return build_experiment(content, folder, {}, **({"seed": 23, "scale_lr": True} | options))
