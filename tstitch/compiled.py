"""torch.compile with a memory and a check: what was compiled stays on disk, and its answers are compared with those of the code that it was made of."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


class Compiled:
    """A function of tensors, compiled: with frozen weights on a CPU, as CUDA graphs on a GPU; for inference only.

    The first answer for each shape of input is compared with the function's own. If they differ by more than the rounding of a long sum, it says so on
    stderr and runs the function itself from then on. Compiled code is kept in ~/.cache/tstitch, or where TORCHINDUCTOR_CACHE_DIR says.

    Args:
        function: returns one tensor; its first argument is a tensor.
        dtype: number type that it computes in.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tstitch" / "compiled"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
        self.function, self.on_gpu, self.tolerance = function, device.type == "cuda", max(1e-4, 6 * torch.finfo(dtype).eps)
        how = {"mode": "reduce-overhead"} if self.on_gpu else {"options": {"freezing": True}} if device.type == "cpu" else {}
        self.compiled = torch.compile(function, **how)
        self.checked: set[torch.Size] = set()

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        """Answer, compiled as long as that can be trusted."""
        answer = self.compiled(x, *others)
        if self.on_gpu:
            answer = answer.clone()  # a graph that is replayed writes into the same memory again
        if x.shape in self.checked:
            return answer
        self.checked.add(x.shape)
        expected = self.function(x, *others)
        error, size = (answer - expected).abs().max().item(), expected.abs().max().item()
        if error <= self.tolerance * size:
            return answer
        print(f"warning: compiled, the model is {error:.2g} away from itself, of values up to {size:.2g}; it is run uncompiled", file=sys.stderr)
        self.compiled, self.on_gpu = self.function, False
        return expected
