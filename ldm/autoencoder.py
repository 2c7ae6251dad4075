"""The first stage of a configuration as the one kind of autoencoder that everything here decodes with."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.config import FirstStageConfig
from tstitch.autoencoder import Autoencoder
from tstitch.errors import InputError
from tstitch.presets import ROOT


def load_autoencoder(config: FirstStageConfig, device: torch.device | str = "cpu") -> Autoencoder:
    """Load a first stage; a relative path that is not found counts from the repository."""
    if config.kind != "diffusers":
        raise InputError("TODO")
    return Autoencoder(find(config.path), device)


def find(path: str) -> str:
    """A path as it is, or where it is not there, from the repository's folder."""
    return str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else path
