"""Shared pieces: tiny random models, and the golden reference files.

The golden files were made by the published code (DiT, T-Stitch, GTA, SiT) on random weights. Tests read the copies under tests/golden; set
TSTITCH_GOLDEN=FOLDER to hold the code to every file of another folder as well.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dit.models import DiT
from tstitch.torchvision_compat import prepare_torchvision

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

prepare_torchvision()  # tests import diffusers
os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # the laws of training are bit for bit, which they are on a CPU

# A process and those that it starts compute with as many threads, or sums differ in their last bit.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


@dataclass
class Case:
    """One golden file: its configuration and tensors."""

    config: dict
    tensors: dict[str, Tensor]

    def models(self) -> list[DiT]:
        """Rebuild the reference's models with the file's weights, strict=True."""
        built = []
        for k, spec in enumerate(self.config["models"]):
            qk_norm = True if spec["family"] == "GTA-DiT" else None
            model = DiT(**spec["args"], qk_norm=qk_norm).eval()
            prefix = "weights." if len(self.config["models"]) == 1 else f"weights.{k}."
            model.load_state_dict({n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}, strict=True)
            built.append(model)
        return built


def golden_files(pattern: str) -> list[Path]:
    """Golden files whose names match, each name once."""
    folders = [GOLDEN, *([Path(os.environ["TSTITCH_GOLDEN"])] if "TSTITCH_GOLDEN" in os.environ else [])]
    return list({path.name: path for folder in folders for path in sorted(folder.glob(pattern))}.values())


def load_case(path: Path) -> Case:
    """Read a golden file."""
    with safe_open(path, "pt") as file:
        return Case(json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def redraw_weights(model: DiT, seed: int, std: float = 0.08) -> DiT:
    """Give every parameter random values: a fresh DiT answers 0, which would make most comparisons empty."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def tiny_dit(seed: int, width: int = 32, depth: int = 2, patch_size: int = 2, **kwargs: object) -> DiT:
    """A DiT of 4x8x8 latents and 10 classes with random weights."""
    return redraw_weights(
        DiT(**{"input_size": 8, "patch_size": patch_size, "hidden_size": width, "depth": depth, "num_heads": 4, "num_classes": 10, **kwargs}), seed
    )


@pytest.fixture(scope="session")
def small_and_large() -> list[DiT]:
    """A small and a large denoiser of the same latents."""
    return [tiny_dit(1, width=16, depth=1, patch_size=4), tiny_dit(2)]


@pytest.fixture
def pipe() -> DiffusionPipeline:
    """A tiny Stable Diffusion pipeline, stitched."""
    from sd_tiny import small_sd, tiny_sd

    from sd.tstitch_sd_utils import stitch

    return stitch(tiny_sd(), small_sd())


@pytest.fixture(scope="session")
def three_denoisers() -> list[DiT]:
    """Small, base and large."""
    return [tiny_dit(1, width=16, depth=1, patch_size=4), tiny_dit(3, width=24), tiny_dit(2)]
