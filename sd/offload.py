"""One U-Net on the accelerator at a time: the weights wait in main memory, and the next U-Net comes while the present one works.

Two U-Nets never take more room than the larger one: of the next U-Net only as much is fetched ahead as fits beside the running one, the rest at the hand-over,
when the running one has left. Weights are not written back, since sampling does not change them; between two calls all of them lie in main memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn


class Switch:
    """Moves U-Nets between main memory and `device`; on a CPU there is nothing to move."""

    def __init__(self, unets: Sequence[nn.Module], device: torch.device) -> None:
        self.unets, self.device = list(unets), device
        self._running: int | None = None
        self._host: dict[int, tuple[Tensor, Tensor]] = {}  # what lies on the accelerator: id -> (tensor, its data in main memory)
        self._stream: torch.cuda.Stream | None = None
        for unet in self.unets:
            unet.to("cpu")

    @property
    def moves(self) -> bool:
        """Whether the device has a memory of its own."""
        return self.device.type != "cpu"

    def to(self, device: torch.device) -> None:
        """Run on another device from now on."""
        if device != self.device:
            self.release()
            self.device, self._stream = device, None

    def enter(self, running: int, following: int | None) -> None:
        """Have U-Net `running` on the device and start to fetch `following`, the one after it; a repeated call costs nothing."""
        if not self.moves or running == self._running:
            return
        self._evict(keep=self.unets[running])
        self._fetch(self._tensors(running))
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._running = running
        if following is not None:
            room = max(self._size(k) for k in range(len(self.unets))) - self._size(running)
            self._fetch(self._tensors(following), room)

    def release(self) -> None:
        """Send everything back to main memory."""
        self._evict()
        self._running = None

    def upload(self, host: Tensor) -> Tensor:
        """A copy on the device."""
        return host.to(self.device, non_blocking=self.device.type == "cuda")

    def _tensors(self, k: int) -> Iterator[Tensor]:
        return chain(self.unets[k].parameters(), self.unets[k].buffers())

    def _size(self, k: int) -> int:
        return sum(tensor.nbytes for tensor in self._tensors(k))

    def _fetch(self, tensors: Iterator[Tensor], room: float = float("inf")) -> None:
        with self._copying():
            for tensor in tensors:
                room -= tensor.nbytes
                if room < 0:
                    return
                if id(tensor) not in self._host:
                    host = tensor.data
                    if self._stream is not None and not host.is_pinned():
                        host = host.pin_memory()  # only then is the copy concurrent with the computation
                    self._host[id(tensor)] = (tensor, host)
                    tensor.data = self.upload(host)

    def _evict(self, keep: nn.Module | None = None) -> None:
        kept = {id(tensor) for tensor in chain(keep.parameters(), keep.buffers())} if keep is not None else set()
        leaving = [key for key in self._host if key not in kept]
        if leaving and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the room is free only once the last step that used it is done
        for key in leaving:
            tensor, host = self._host.pop(key)
            tensor.data = host

    def _copying(self) -> AbstractContextManager:
        if self.device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return torch.cuda.stream(self._stream)
