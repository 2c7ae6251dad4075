"""What is in a checkpoint, and any supported checkpoint as one of ours: published names, configuration in the header."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tstitch.checkpoints.layouts import config_from_shapes, hints_from, model_name, published_shapes, sincos_position_embedding, to_published
from tstitch.checkpoints.weights import Checkpoint, check_shapes, file_hash, read_checkpoint, save_weights
from tstitch.errors import InputError
from tstitch.files import check_file

PUBLISHED_FLOW = {"path_type": "Linear", "prediction": "velocity"}  # of the SiT whose weights are published
FLOW_WORDS = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")  # what says which flow a SiT was trained for


def build_named(models: Mapping[str, Callable[..., Any]], name: str, **arguments: Any) -> Any:  # noqa: ANN401  (one of `models`, its arguments)
    """Make an untrained model of a named size.

    Raises:
        InputError: if the name is unknown or the arguments do not fit together.
    """
    if name not in models:
        raise InputError(f"unknown model '{name}'; choose from {', '.join(models)}")
    return models[name](**arguments)


@dataclass(frozen=True)
class Published:
    """Weights under the published DiT names, the constructor arguments that fit them, and what was done to get there."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    notes: list[str]


def as_published(checkpoint: Checkpoint, use: str | None = None, **told: Any) -> Published:  # noqa: ANN401  (the keywords of config_from_shapes)
    """Bring a DiT, fast-DiT, GTA, SiT, REPA or diffusers checkpoint to the published names; ours are returned as they are.

    Args:
        use: "ema" or "model"; None takes the moving average where there is one.
        told: num_heads, input_size, num_classes, posenc; they count where neither the file nor its trainer says.

    Raises:
        InputError: if the tensors are not those of a DiT, or something has to be told.
    """
    state = checkpoint.state(use)
    if checkpoint.config:
        try:
            check_shapes(published_shapes(checkpoint.config), state, checkpoint.path)
        except KeyError:
            raise InputError(f"{checkpoint.path} is not a DiT: its header has {', '.join(sorted(checkpoint.config))}; pass weights of a DiT") from None
        return Published(state, checkpoint.config, [])
    layout, state, notes = to_published(state)
    if layout is None:
        raise InputError(f"{checkpoint.path} is not a DiT: it has {', '.join(list(state)[:2])}, ...; pass weights of DiT, GTA, SiT, REPA or diffusers' DiT")
    told |= hints_from(checkpoint.arguments)
    if layout == "diffusers":
        _add_position_embedding(checkpoint, state, told)
        notes.append("diffusers spaces the frequencies of time a little differently from DiT: right for a DiT's weights, not for a model trained in diffusers")
    try:
        config = config_from_shapes(state, **told)
    except InputError as error:
        raise InputError(f"{checkpoint.path}: {error}") from None
    check_shapes(published_shapes(config), state, checkpoint.path)
    if "path_type" in checkpoint.arguments:
        notes.append(f"trained as a SiT ({checkpoint.arguments.get('prediction', 'velocity')} of a flow, time in 0..1): a diffusion solver cannot sample it")
    return Published(state, config, notes)


def as_sized(checkpoint: Checkpoint, name: str | None, wanted: Mapping[str, Any], **told: Any) -> Published:  # noqa: ANN401  (as in as_published)
    """`as_published`, for a model that must have the size of `name`.

    Args:
        wanted: configuration of a model of that name; {} accepts any size.

    Raises:
        InputError: as `as_published`, or if the size is another.
    """
    if wanted:
        told = {"num_heads": wanted["num_heads"]} | told
    published = as_published(checkpoint, **told)
    sizes = ("patch_size", "hidden_size", "depth", "num_heads") if wanted else ()
    differ = [f"{key} {published.config[key]}, {name} has {wanted[key]}" for key in sizes if published.config[key] != wanted[key]]
    if differ:
        raise InputError(f"{checkpoint.path} is a model of another size ({'; '.join(differ)}); pass weights of {name}")
    return published


def _add_position_embedding(checkpoint: Checkpoint, state: dict[str, Tensor], told: dict[str, Any]) -> None:
    activation = checkpoint.arguments.get("activation_fn", "gelu-approximate")
    if activation != "gelu-approximate":
        raise InputError(f"{checkpoint.path} has the activation {activation}, a DiT has gelu-approximate; it cannot be converted")
    if told.get("input_size") is None:
        raise InputError(f"{checkpoint.path}: the file does not tell the size of the latents; keep diffusers' config.json beside it, or pass --input-size")
    hidden, _, patch, _ = state["x_embedder.proj.weight"].shape
    state["pos_embed"] = sincos_position_embedding(hidden, told["input_size"] // patch)


def convert(path: Path, out: Path, dtype: torch.dtype = torch.float32, use: str | None = None, kind: str | None = None, **told: Any) -> Published:  # noqa: ANN401
    """Write a checkpoint as safetensors with its configuration; arguments as in `as_published`.

    Args:
        kind: "DiT" or "SiT", which have the same tensors, for a bare state dict; None takes it for a DiT and notes that.

    Raises:
        InputError: if it cannot be read or converted, contradicts what was told, or `out` is no .safetensors; then nothing is written.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out} must end in .safetensors; the configuration lives in that format's header")
    check_file(out)
    checkpoint = read_checkpoint(path)
    published = as_published(checkpoint, use, **told)
    wrong = [f"{key} is {published.config[key]}, not {value}" for key, value in told.items() if value not in (None, published.config[key])]
    if wrong:
        raise InputError(f"{path} says itself that {', '.join(wrong)}; leave that out")
    width, heads = published.config["hidden_size"], published.config["num_heads"]
    if width % heads:
        raise InputError(f"{path}: width {width} is not divisible by {heads} heads; pass another --num-heads")
    # What a SiT's trainer says of its flow goes along; without it the file would pass for a DiT's. REPA's words mean time the other way round.
    said = checkpoint.arguments
    flow = {key: value for key in FLOW_WORDS if (value := said.get(key)) is not None} if said.get("path_type") in ("Linear", "GVP", "VP") else {}
    if checkpoint.config or said:
        if kind is not None:
            raise InputError(f"{path} says itself what it was trained as; leave --kind out")
    elif kind == "SiT":
        flow = PUBLISHED_FLOW
    elif kind is None:
        published.notes.append("the file does not say whether it is a DiT or a SiT, and is written as a DiT; pass --kind to say which")
    save_weights(out, published.state, published.config | flow, dtype)
    return published


def inspect(path: Path) -> dict[str, Any]:
    """Say what is in a checkpoint file: plain values, in the order in which they are shown.

    Raises:
        InputError: if it cannot be read.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint.state()
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    found = {
        "file": str(path),
        "layout": "ours" if checkpoint.config else to_published(state)[0] or "unknown",
        "holds": [*checkpoint.weights, *checkpoint.others],
        "step": checkpoint.step,
        "tensors": len(state),
        "parameters": sum(value.numel() for value in state.values()),
        "dtype": dtypes,
        "bytes": path.stat().st_size,
        "sha256": file_hash(path),
    }
    try:
        published = as_published(checkpoint)
        return found | {"model": model_name(published.config), "config": published.config, "notes": published.notes}
    except InputError as error:
        return found | {"model": None, "config": None, "notes": [str(error)]}
