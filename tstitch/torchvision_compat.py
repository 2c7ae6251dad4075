"""A torchvision wheel built for CUDA beside a torch built for the CPU.

Such a wheel's compiled part cannot be loaded, so the operators `nms` and `qnms` are never declared, and `import torchvision` dies while describing them.
Declared by hand, without an implementation, everything written in Python works: transforms, datasets, models, and what is built on them. We use none of
it ourselves; torch-fidelity and diffusers import torchvision where it is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import torch


@functools.cache
def prepare_torchvision() -> None:
    """Make `import torchvision` work where its build and torch's disagree; elsewhere do nothing. Call before the import."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    # Read as text: importing it is what fails. The package's metadata leaves the build out.
    version = re.search(r"__version__ = '.*\+(\w+)'", (Path(spec.origin).parent / "version.py").read_text())
    if version and version[1].startswith("cu") and torch.version.cuda is None:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
