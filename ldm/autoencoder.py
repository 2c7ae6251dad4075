"""The first stage of a configuration as the one kind of autoencoder that everything here decodes with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ldm.checkpoints import load_ldm_first_stage, read_ldm_first_stage
from ldm.config import FirstStageConfig
from tstitch.autoencoder import Autoencoder, AutoencoderFile, Source
from tstitch.errors import InputError
from tstitch.presets import ROOT


def first_stage_source(config: FirstStageConfig, path: str | Path | None = None, scale_factor: float = 1.0) -> Source:
    """What `tstitch.autoencoder.Autoencoder` takes for a first stage; nothing is read yet.

    Args:
        path: weights in place of the configuration's: CompVis' own, or a LatentDiffusion .ckpt that holds them; for "diffusers" a folder or hub name.
            A relative path that is not found counts from the repository.
        scale_factor: of the diffusion model, what its latents are multiplied by; a "diffusers" autoencoder has its own.

    Raises:
        InputError: if no weights are named.
    """
    path = path or config.path
    if path is None:
        raise InputError("the configuration's first stage names no weights; add its ckpt_path, or pass --ae_ckpt where the script has it")
    found = find(str(path))
    if config.kind == "diffusers":
        return found

    def load() -> nn.Module:
        return load_ldm_first_stage(read_ldm_first_stage(found), config.params, config.kind, scale_factor, found)

    return AutoencoderFile(Path(found), load)


def load_autoencoder(config: FirstStageConfig, device: torch.device | str = "cpu", path: str | Path | None = None, scale_factor: float = 1.0) -> Autoencoder:
    """Load a first stage; the arguments are those of `first_stage_source`.

    Raises:
        InputError: if there are no weights, or they do not fit the configuration.
    """
    return Autoencoder(first_stage_source(config, path, scale_factor), device)


def find(path: str) -> str:
    """A path as it is, or where it is not there, from the repository's folder."""
    return str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else path
