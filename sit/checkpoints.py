"""Build a SiT by name, or from a file that says what it is and which flow it was trained for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dit.models import DiT
from sit.bridge import Bridge, Diffusion, Flow
from sit.cli import TRANSPORT_WORDS, equation_from, transport_from
from sit.flows import flow_walker
from sit.models import SiT, SiT_models
from sit.transport import Transport, create_transport
from tstitch.checkpoints import Checkpoint, read_checkpoint
from tstitch.checkpoints.convert import as_published
from tstitch.cli import SamplingPlan
from tstitch.errors import InputError
from tstitch.guidance import Denoiser
from tstitch.presets import DenoiserFile

# The bundled emoji models: latents of 4x16x16; patch 4 makes 16 tokens, patch 2 makes 64. Smaller than the DiTs, so that all of them fit the repository.
EMOJI_SIZES: dict[str, dict[str, Any]] = {
    "emoji-small": {"patch_size": 4, "hidden_size": 128, "depth": 6, "num_heads": 4},
    "emoji-large": {"patch_size": 2, "hidden_size": 192, "depth": 5, "num_heads": 4},
}
SIT_CONFIGS = [*SiT_models, *EMOJI_SIZES]


def build_sit(name: str, **arguments: Any) -> SiT:  # noqa: ANN401  (the arguments of SiT)
    """Make an untrained model of a named size.

    Raises:
        InputError: if the name is unknown or the arguments do not fit together.
    """
    if name in SiT_models:
        return SiT_models[name](**arguments)
    if name in EMOJI_SIZES:
        return SiT(**EMOJI_SIZES[name], **arguments)
    raise InputError(f"unknown model '{name}'; choose from {', '.join(SIT_CONFIGS)}")


def said_by(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says of the flow it was trained for, of TRANSPORT_WORDS; {} where it says nothing."""
    told = checkpoint.arguments | checkpoint.config
    return {word: told[word] for word in TRANSPORT_WORDS if told.get(word) is not None}


def is_dit(checkpoint: Checkpoint) -> bool:
    """Whether it is a DiT of ours, or of a trainer that says so; a bare state dict may be either and is taken for a SiT."""
    return bool(checkpoint.config or "model_config" in checkpoint.arguments) and not said_by(checkpoint)


def load_sit(path: str | Path, name: str | None = None, **told: Any) -> SiT:  # noqa: ANN401  (what as_published may be told)
    """Load a SiT in eval mode, float32; the arguments are those of `dit.checkpoints.load_dit`.

    Raises:
        InputError: if the file cannot be read, is no SiT or of another size than `name`, or something has to be told.
    """
    return _load(SiT, read_checkpoint(path), name, told)


def _load(kind: type[DiT], checkpoint: Checkpoint, name: str | None, told: dict[str, Any]) -> Any:  # noqa: ANN401  (a `kind`)
    wanted: dict[str, Any] = {}
    if name in SIT_CONFIGS:
        with torch.device("meta"):
            wanted = build_sit(name).config
        told = {"num_heads": wanted["num_heads"]} | told
    published = as_published(checkpoint, **told)
    config = {key: value for key, value in published.config.items() if key not in TRANSPORT_WORDS}
    sizes = ("patch_size", "hidden_size", "depth", "num_heads") if wanted else ()
    differ = [f"{key} {config[key]}, {name} has {wanted[key]}" for key in sizes if config[key] != wanted[key]]
    if differ:
        raise InputError(f"{checkpoint.path} is a model of another size ({'; '.join(differ)}); pass weights of {name}")
    return kind.from_published(replace(published, config=config), checkpoint.path)


def load_flows(plan: SamplingPlan, files: Sequence[DenoiserFile]) -> list[Denoiser]:
    """Load the models of a sampling plan onto its device, in its number type, as models of its flow.

    A DiT, or a SiT that was trained on another path or for another prediction, is carried over by a `Bridge`.

    Raises:
        InputError: if a file is missing or damaged, or was trained for other pictures or classes.
    """
    transport: Transport = plan.walker.transport
    models: list[Denoiser] = []
    for file in files:
        checkpoint = read_checkpoint(file.path)
        said = said_by(checkpoint)
        kind, name = (DiT, None) if is_dit(checkpoint) else (SiT, file.model)
        model = _load(kind, checkpoint, name, {"input_size": plan.latent_size, "num_classes": plan.num_classes})
        plan.check_fit(model, file.path)
        model = model.to(plan.device, plan.dtype)
        own = create_transport(**said)
        if kind is DiT:
            models.append(Bridge(model, Diffusion(), transport))
        elif said and (own.name, own.prediction) != (transport.name, transport.prediction):
            models.append(Bridge(model, Flow(own), transport))
        else:
            models.append(model)
    return models


def flow_plan(args: argparse.Namespace, plan: SamplingPlan, files: Sequence[DenoiserFile], alone: bool = True) -> SamplingPlan:
    """Complete a sampling plan with the flow of its last file and the equation of the command line; `alone` as in `ODEWalker`.

    Raises:
        InputError: if the file cannot be read, the command line contradicts it, or the equation cannot be walked.
    """
    transport = transport_from(args, said_by(read_checkpoint(files[-1].path)), files[-1].path)
    return replace(plan, walker=flow_walker(equation_from(args, transport, plan.num_steps), alone))
