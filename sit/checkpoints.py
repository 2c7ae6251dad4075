"""Build a SiT by name, or from a file that says what it is and which flow it was trained for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit.inference import prepare_for_inference
from dit.models import DiT
from sit.bridge import Bridge, Diffusion, Flow
from sit.cli import TRANSPORT_WORDS, equation_from, transport_from
from sit.flows import flow_walker
from sit.models import SiT, SiT_models
from sit.transport import Transport, create_transport
from tstitch.checkpoints import Checkpoint, read_checkpoint
from tstitch.checkpoints.convert import as_sized, build_named
from tstitch.cli import SamplingPlan
from tstitch.errors import InputError
from tstitch.guidance import Denoiser
from tstitch.presets import DenoiserFile

# The bundled emoji models: latents of 4x16x16; patch 4 makes 16 tokens, patch 2 makes 64. Smaller than the DiTs, so that all of them fit the repository.
EMOJI_SIZES: dict[str, dict[str, Any]] = {
    "emoji-small": {"patch_size": 4, "hidden_size": 128, "depth": 6, "num_heads": 4},
    "emoji-large": {"patch_size": 2, "hidden_size": 192, "depth": 5, "num_heads": 4},
}
SIT_CONFIGS: dict[str, Callable[..., SiT]] = SiT_models | {name: partial(SiT, **size) for name, size in EMOJI_SIZES.items()}
ANY_SIZE = "base"  # what --b_ckpt is called beside a preset that has no base model


def build_sit(name: str, **arguments: Any) -> SiT:  # noqa: ANN401  (the arguments of SiT)
    """`build_named` of SIT_CONFIGS."""
    return build_named(SIT_CONFIGS, name, **arguments)


def said_by(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says of the flow it was trained for, of TRANSPORT_WORDS; {} where it says nothing."""
    told = checkpoint.arguments | checkpoint.config
    return {word: told[word] for word in TRANSPORT_WORDS if told.get(word) is not None}


def is_dit(checkpoint: Checkpoint) -> bool:
    """Whether it is a DiT of ours, or of a trainer that says so; a bare state dict may be either and is taken for a SiT."""
    if "model_config" in checkpoint.arguments or checkpoint.config:
        return not said_by(checkpoint)
    return str(checkpoint.arguments.get("model", "")).startswith("DiT")


def load_sit(path: str | Path, name: str | None = None, **told: Any) -> SiT:  # noqa: ANN401  (what as_published may be told)
    """Load a SiT in eval mode, float32; the arguments are those of `dit.checkpoints.load_dit`.

    Raises:
        InputError: if the file cannot be read, is no SiT or of another size than `name`, or something has to be told.
    """
    checkpoint = read_checkpoint(path)
    if is_dit(checkpoint):
        raise InputError(f"{path} was trained as a DiT, whose time and output differ; sit/sample_t_stitch.py carries it over to a flow")
    return _load(SiT, checkpoint, name, told)


def _load(kind: type[DiT], checkpoint: Checkpoint, name: str | None, told: dict[str, Any]) -> Any:  # noqa: ANN401  (a `kind`)
    wanted: dict[str, Any] = {}
    if name not in (None, ANY_SIZE):
        with torch.device("meta"):
            wanted = build_sit(name).config
    published = as_sized(checkpoint, name, wanted, **told)
    config = {key: value for key, value in published.config.items() if key not in TRANSPORT_WORDS}
    return kind.from_published(replace(published, config=config), checkpoint.path)


def mark_dits(args: argparse.Namespace, files: Sequence[DenoiserFile]) -> list[DenoiserFile]:
    """Small, (base,) large, with those that --dit names marked as DiTs."""
    flags = ("s", "xl") if len(files) == 2 else ("s", "b", "xl")
    return [replace(file, model="DiT") if flag in args.dit else file for flag, file in zip(flags, files, strict=True)]


def load_flows(plan: SamplingPlan, files: Sequence[DenoiserFile], given: Mapping[str, Any] | None = None, prepare: bool = True) -> list[Denoiser]:
    """Load the models of a sampling plan onto its device, in its number type, as models of its flow.

    A DiT, or a SiT that was trained on another path or for another prediction, is carried over by a `Bridge`.

    Args:
        given: words of the command line about the flow, for files that do not say it; without them Linear, velocity, as published.
        prepare: make them fast to call; False for a likelihood, which differentiates by x.

    Raises:
        InputError: if a file is missing or damaged, or was trained for other pictures, latents or classes.
    """
    transport: Transport = plan.walker.transport
    models: list[Denoiser] = []
    for file in files:
        checkpoint = read_checkpoint(file.path)
        said = said_by(checkpoint)
        kind, name = (DiT, None) if is_dit(checkpoint) or file.model == "DiT" else (SiT, file.model)
        model = _load(kind, checkpoint, name, {"input_size": plan.latent_size, "num_classes": plan.num_classes})
        plan.check_fit(model, file.path)
        model = model.to(plan.device, plan.dtype).requires_grad_(False)
        if prepare:
            model = prepare_for_inference(model, compile=plan.compiles)
        own = create_transport(**(dict(given or {}) | said))
        if kind is DiT:
            models.append(Bridge(model, Diffusion(), transport))
        elif (own.name, own.prediction) != (transport.name, transport.prediction):
            models.append(Bridge(model, Flow(own), transport))
        else:
            models.append(model)
    if len({model.latent_shape for model in models}) > 1:
        raise InputError(f"models of latents {' and '.join(str(model.latent_shape) for model in models)} cannot be stitched; pass models of one autoencoder")
    return models


def flow_plan(args: argparse.Namespace, plan: SamplingPlan, files: Sequence[DenoiserFile], alone: bool = True) -> SamplingPlan:
    """Complete a sampling plan with the flow of its last file and the equation of the command line; `alone` as in `ODEWalker`.

    Raises:
        InputError: if the file cannot be read, the command line contradicts it, or the equation cannot be walked.
    """
    transport = transport_from(args, said_by(read_checkpoint(files[-1].path)), files[-1].path)
    return replace(plan, walker=flow_walker(equation_from(args, transport, plan.num_steps), alone))
