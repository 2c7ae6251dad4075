"""The file that build_dataset.py writes, read into memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tstitch.errors import InputError

DATASET = Path("data/emoji/emoji64.npz")


@dataclass(frozen=True)
class Drawings:
    """Emoji drawings: images (N, 3, 64, 64) uint8, labels (N,) in 0..8, drawing_sets (N,) 0 Noto 1 Twemoji."""

    images: Tensor
    labels: Tensor
    drawing_sets: Tensor
    names: list[str]

    def batch(self, index: Tensor) -> Tensor:
        """Images in [-1, 1], float32."""
        return self.images[index].float() / 127.5 - 1


def load_drawings(path: Path, held_out: bool) -> Drawings:
    """Read the training drawings, or the tenth that was held out, from a file of build_dataset.py.

    Raises:
        InputError: if the file is not there.
    """
    if not path.exists():
        raise InputError(f"no dataset at {path}; make it with python assets/emoji/build_dataset.py")
    with np.load(path) as columns:
        chosen = np.flatnonzero(columns["held_out"] == held_out)
        return Drawings(
            images=torch.from_numpy(columns["image"][chosen]).permute(0, 3, 1, 2).contiguous(),
            labels=torch.from_numpy(columns["label"][chosen]).long(),
            drawing_sets=torch.from_numpy(columns["drawing_set"][chosen]).long(),
            names=columns["name"][chosen].tolist(),
        )
