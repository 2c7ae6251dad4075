"""Read, write, hash and strictly load weights. Nothing here knows a model; nothing that could run code is unpickled."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tstitch.errors import InputError
from tstitch.files import atomic_path, existing_folder, read_json

STEP_WORDS = ("step", "steps", "train_steps", "global_step")  # of DiT's, GTA's, fast-DiT's and Lightning's trainers


class _Inert:
    """Stands in a checkpoint for what a trainer left beside its weights; holds nothing and does nothing."""

    def __init__(self, *ignored: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Lightning before 1.5 names callbacks by their class and keeps their best score as a numpy number. None of it is imported or called here.
_TRAINER_OBJECTS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Args:
        weights: state dicts: "ema" (the moving average) or "model" or both; a bare state dict is "model".
        config: the model's constructor arguments; {} in files of others.
        arguments: what its trainer or its library wrote about the model: a command line, or diffusers' config.json.
        step: training steps, where the file or its name says so.
        others: what a training checkpoint holds besides, by key ("opt", "scaler").
    """

    path: Path
    weights: dict[str, dict[str, Tensor]]
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    others: tuple[str, ...] = ()

    def state(self, use: str | None = None) -> dict[str, Tensor]:
        """State dict "ema" or "model"; None takes the moving average where there is one.

        Raises:
            InputError: if the file does not hold it.
        """
        use = use or ("ema" if "ema" in self.weights else "model")
        if use not in self.weights:
            raise InputError(f"{self.path} holds no {use} weights; choose from {', '.join(self.weights)}")
        return self.weights[use]


def save_weights(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> None:
    """Write safetensors atomically; floating tensors as `dtype`, `config` as JSON in the header.

    Raises:
        InputError: if a finite weight is too large for `dtype`.
    """
    tensors = {k: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype).contiguous() for k, v in state.items()}
    if large := [k for k, v in tensors.items() if v.is_floating_point() and v.isinf().any() and not state[k].isinf().any()]:
        kind = str(dtype).removeprefix("torch.")
        raise InputError(f"{large[0]} holds weights too large for {kind}, so {path} is not written; choose a wider number type, or train with --clip-norm 1")
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"config": json.dumps(dict(config))})


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint: safetensors, a bare state dict, or a training checkpoint.

    Raises:
        InputError: if the file is missing, truncated, no checkpoint, or would run code when read.
    """
    path = Path(path)
    if existing_folder(path) != path or not path.is_file():
        raise InputError(f"no checkpoint at {path}; pretrained_models/readme.txt says where published weights come from")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                config = _words(json.loads((file.metadata() or {}).get("config", "{}")))
            return Checkpoint(path, {"model": safetensors.torch.load_file(path)}, config, _library_config(path))
        except (SafetensorError, ValueError, OSError) as error:
            raise InputError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from None
    content = _unpickle(path)
    weights: dict[str, Any] = {name: content[name] for name in ("ema", "model") if name in content}
    weights = weights or {"model": content.get("state_dict", content)}  # Lightning's word
    if not all(isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()) for state in weights.values()):
        raise InputError(f"{path} holds no state dict of named tensors; pass a model checkpoint")
    if "model" in weights and weights["model"] is content:
        return Checkpoint(path, weights, arguments=_library_config(path))
    arguments = content.get("args")
    arguments = _words(vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments)
    status = _words(content.get("status"))  # where GTA's trainer counts
    named = int(path.stem) if path.stem.isdigit() else None
    step = next((place[key] for place in (content, status) for key in STEP_WORDS if key in place), named)
    others = tuple(key for key in content if key not in ("ema", "model", "state_dict", "args", *STEP_WORDS))
    return Checkpoint(path, weights, _words(arguments.get("model_config")), arguments, step, others)


def _words(found: object) -> dict[str, Any]:
    """What a file says by name: {} for anything but a dict with names for keys."""
    return found if isinstance(found, dict) and all(isinstance(key, str) for key in found) else {}


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        # Published training checkpoints carry their command line as a Namespace: plain data, the one class let in. Mapped, not read: of a
        # training checkpoint's four times the model, only what is used reaches memory.
        with torch.serialization.safe_globals([argparse.Namespace, *((_Inert, name) for name in _TRAINER_OBJECTS)]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is damaged or holds more than tensors and was not loaded ({first_line(error)}); fetch it again from its owner") from None
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, struct.error) as error:
        raise InputError(f"{path} is truncated or no checkpoint ({first_line(error)}); fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a state dict; pass a model checkpoint")
    if unnamed := [key for key in content if not isinstance(key, str)]:
        raise InputError(f"{path} holds a dict with keys such as {unnamed[0]!r}, not a state dict, whose keys are names; pass a model checkpoint")
    return content


def _library_config(path: Path) -> dict[str, Any]:
    """Configuration that diffusers writes beside the weights, {} where there is none."""
    config = path.with_name("config.json")
    content = read_json(config) if config.is_file() else {}
    return content if isinstance(content, dict) and "_diffusers_version" in content else {}


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state dict, and the configuration stored with it ({} where there is none).

    From a training checkpoint the moving average ("ema") is taken.

    Raises:
        InputError: as `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    return checkpoint.state(), checkpoint.config


def read_training_state(path: str | Path) -> dict[str, Any]:
    """What a trainer needs to go on from another trainer's checkpoint: state dicts "model", "ema" and "opt".

    Raises:
        InputError: as `read_checkpoint`, or if one of the three is missing.
    """
    checkpoint = read_checkpoint(path)
    if "model" not in checkpoint.weights or "ema" not in checkpoint.weights or "opt" not in checkpoint.others:
        raise InputError(f"{path} holds {', '.join([*checkpoint.weights, *checkpoint.others])}, not model, ema and opt; pass it with --init-from")
    weights = {name: {key.removeprefix("module."): value for key, value in state.items()} for name, state in checkpoint.weights.items()}
    return weights | {"opt": _unpickle(checkpoint.path)["opt"]}


def first_line(error: BaseException) -> str:
    """First line of an error's message, at most 160 characters, or its kind where there is none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def file_hash(path: str | Path) -> str:
    """First 16 hex digits of a file's SHA-256: tells whether two results were made with the same weights.

    Raises:
        InputError: if the file is missing.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**22):  # a training checkpoint may be larger than memory
                digest.update(block)
    except OSError as error:
        raise InputError(f"could not read {path} ({error.strerror}); check the path") from None
    return digest.hexdigest()[:16]


def check_shapes(expected: Mapping[str, Sequence[int]], state: Mapping[str, Tensor], source: str | Path) -> None:
    """Compare the tensors of a state dict with the names and shapes of a model.

    Raises:
        InputError: naming the first tensors that are missing, left over or of another shape.
    """
    differ = [
        f"{k} is {list(state[k].shape)}, the model has {list(shape)}" for k, shape in expected.items() if k in state and list(state[k].shape) != list(shape)
    ]
    differ += [f"{k} is missing" for k in expected if k not in state] + [f"{k} is unknown to the model" for k in state if k not in expected]
    if differ:
        more = f" and {len(differ) - 2} more" if len(differ) > 2 else ""
        raise InputError(f"{source} does not fit the model: {'; '.join(differ[:2])}{more}. Choose the model, image size and --num-classes it was trained with")


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        InputError: as `check_shapes`.
    """
    check_shapes({name: value.shape for name, value in model.state_dict().items()}, state, source)
    model.load_state_dict(state, strict=True)
