"""Build a DiT by name, or from a file that says what it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit.inference import InferenceDiT, prepare_for_inference
from dit.models import DiT, DiT_models
from tstitch.checkpoints import read_checkpoint
from tstitch.checkpoints.convert import as_sized, build_named
from tstitch.cli import SamplingPlan
from tstitch.errors import InputError
from tstitch.presets import DenoiserFile

# The bundled emoji models: latents of 4x16x16. Patch 4 makes 16 tokens, patch 2 makes 64, and compute goes with tokens.
EMOJI_SIZES: dict[str, dict[str, Any]] = {
    "emoji-small": {"patch_size": 4, "hidden_size": 160, "depth": 6, "num_heads": 4},
    "emoji-base": {"patch_size": 2, "hidden_size": 160, "depth": 5, "num_heads": 4},
    "emoji-large": {"patch_size": 2, "hidden_size": 224, "depth": 6, "num_heads": 4},
}
DIT_CONFIGS: dict[str, Callable[..., DiT]] = DiT_models | {name: partial(DiT, **size) for name, size in EMOJI_SIZES.items()}


def build_dit(name: str, **arguments: Any) -> DiT:  # noqa: ANN401  (the arguments of DiT)
    """`build_named` of DIT_CONFIGS."""
    return build_named(DIT_CONFIGS, name, **arguments)


def load_dit(path: str | Path, name: str | None = None, **told: Any) -> DiT:  # noqa: ANN401  (what as_published may be told)
    """Load weights in eval mode, float32.

    Args:
        path: safetensors of ours, or a checkpoint of DiT, fast-DiT, GTA, SiT, REPA or diffusers.
        name: model size that it must have; needed for an unpublished size whose file does not say its heads.
        told: input_size, num_classes and so on, for what neither the file nor its trainer says.

    Raises:
        InputError: if the file cannot be read, is no DiT or of another size than `name`, or something has to be told.
    """
    wanted: dict[str, Any] = {}
    if name is not None:
        with torch.device("meta"):
            wanted = build_dit(name).config
    checkpoint = read_checkpoint(path)
    if "path_type" in checkpoint.arguments | checkpoint.config:
        raise InputError(f"{path} was trained as a SiT, whose time and output differ; a diffusion solver cannot sample it, pass a DiT")
    published = as_sized(checkpoint, name, wanted, **told)
    return DiT.from_published(published, path)


def load_denoisers(plan: SamplingPlan, files: Sequence[DenoiserFile], posenc: str | None = None) -> list[InferenceDiT]:
    """Load the denoisers of a sampling plan onto its device, in its number type, ready to walk its timesteps.

    Args:
        posenc: counts where a file does not say its position encoding.

    Raises:
        InputError: if a file is missing or damaged, or was trained for other pictures or classes.
    """
    denoisers = []
    for file in files:
        model = load_dit(file.path, file.model, input_size=plan.latent_size, num_classes=plan.num_classes, posenc=posenc)
        plan.check_fit(model, file.path)
        denoisers.append(prepare_for_inference(model.to(plan.device, plan.dtype), plan.solver.timesteps, plan.compiles))
    return denoisers
