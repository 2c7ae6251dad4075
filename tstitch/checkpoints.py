"""Weights in and out: no unsafe pickle, the EMA where there is one, and a clear word when a file does not fit its model.

Ours are safetensors with the model's constructor arguments in the header ("config"), so a file says by itself what it is. Published DiT files (.pt, a
bare state dict, or a dict with "ema") load too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tstitch.errors import InputError
from tstitch.files import atomic_path


def save_weights(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> None:
    """Write safetensors atomically; floating tensors as `dtype`, `config` as JSON in the header."""
    tensors = {k: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype).contiguous() for k, v in state.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"config": json.dumps(dict(config))})


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state dict, and the configuration stored with it ({} where there is none).

    From a training checkpoint the moving average ("ema") is taken.

    Raises:
        InputError: if the file is missing, truncated, no checkpoint, or would run code when read.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; pretrained_models/readme.txt says where published weights come from")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                config = json.loads((file.metadata() or {}).get("config", "{}"))
            return safetensors.torch.load_file(path), config
        except (SafetensorError, ValueError, OSError) as error:
            raise InputError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from None
    try:
        # Published training checkpoints carry their command line as a Namespace: plain data, the one class allowed here.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is damaged or holds more than tensors and was not loaded ({first_line(error)}); fetch it again from its owner") from None
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, struct.error) as error:
        raise InputError(f"{path} is truncated or no checkpoint ({first_line(error)}); fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a state dict; pass a model checkpoint")
    arguments = content.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments or {}
    state = content.get("ema", content.get("model", content))
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds no state dict of tensors; pass a model checkpoint")
    return state, arguments.get("model_config", {})


def first_line(error: Exception) -> str:
    """First line of an error's message, at most 160 characters, or its kind where there is none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def file_hash(path: str | Path) -> str:
    """First 16 hex digits of a file's SHA-256: tells whether two results were made with the same weights.

    Raises:
        InputError: if the file is missing.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InputError(f"could not read {path} ({error.strerror}); check the path") from None


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        InputError: naming the first tensors that are missing, left over or of another shape.
    """
    ours = model.state_dict()
    differ = [f"{k} is {list(state[k].shape)}, the model has {list(ours[k].shape)}" for k in ours if k in state and state[k].shape != ours[k].shape]
    differ += [f"{k} is missing" for k in ours if k not in state] + [f"{k} is unknown to the model" for k in state if k not in ours]
    if differ:
        more = f" and {len(differ) - 2} more" if len(differ) > 2 else ""
        raise InputError(f"{source} does not fit the model: {'; '.join(differ[:2])}{more}. Choose the model size and image size it was trained with")
    model.load_state_dict(state, strict=True)
