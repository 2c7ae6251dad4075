"""What a user asks for, what comes back, and how a backbone tells how far it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from sd.page.drawings import Point
from tstitch.errors import InputError
from tstitch.plots import image_grid
from tstitch.schedule import StitchSchedule

Watch = Callable[[float, str], None]  # told the share of the work that is done, and what is done now; raises to stop


@dataclass(frozen=True)
class Request:
    """What a user asks for; `subject` is the name of a class, or a prompt."""

    subject: str
    seed: int = 0
    num_steps: int = 20
    guidance: float = 2.0
    count: int = 1
    method: str = ""
    negative_prompt: str = ""
    large: str = ""
    small: str = ""

    def check(self, backbone: Backbone) -> None:
        """Refuse what cannot be sampled, before anything is loaded.

        Raises:
            InputError: for the first value that is missing or out of range.
        """
        for name, value, low, high in (
            ("seed", self.seed, 0, 2**32 - 1), ("number of steps", self.num_steps, 2, backbone.max_steps),
            ("number of pictures", self.count, 1, backbone.max_count), ("guidance", self.guidance, 1, backbone.max_guidance),
        ):  # fmt: skip
            if value is None or not low <= value <= high:
                raise InputError(f"the {name} must lie in {low:g}..{high:.10g}" + ("; type a number" if value is None else f", got {value:.10g}"))
        if not (self.subject or "").strip():
            raise InputError("the prompt is empty; write what the picture shall show")
        if self.negative_prompt and self.guidance <= 1:
            raise InputError("what is not to be in the picture counts only with guidance above 1; raise it, or leave that field empty")


@dataclass(frozen=True)
class Sample:
    """Pictures along one schedule, what they cost, and how good they are."""

    schedule: StitchSchedule
    name: str  # e.g. S:40 L:60
    sheet: Image.Image
    seconds: float  # a picture, along this schedule alone
    speed_up: float  # against the large model alone
    difference: float  # root mean square, in grey levels, from the pictures of the large model alone
    fd_emoji: float | None = None


def sheet(pictures: Tensor) -> Image.Image:
    """Lay out pictures uint8 (N, 3, H, W) in a square, small ones enlarged without blur."""
    columns = math.isqrt(len(pictures) - 1) + 1
    blank = torch.full_like(pictures[:1], 255).expand(-len(pictures) % columns, -1, -1, -1)
    return image_grid(torch.cat([pictures, blank]).unflatten(0, (-1, columns)), [""] * columns, cell=max(64, 512 // columns))


def large_alone(num_denoisers: int) -> StitchSchedule:
    """All steps for the last denoiser."""
    return StitchSchedule((0.0,) * (num_denoisers - 1) + (1.0,))


def difference(pictures: Tensor, reference: Tensor) -> float:
    """Root mean square difference of two batches uint8, in grey levels."""
    return float((pictures.float() - reference.float()).pow(2).mean().sqrt())


class Backbone(Protocol):
    """What a tab needs to know of what it samples from."""

    title: str
    sentence: str
    bundled: bool  # whether sampling needs nothing that is not here
    prompts: bool  # whether subjects are written, or chosen from `subjects`
    max_steps: int
    max_count: int
    max_guidance: float
    letters: Sequence[str]  # of the models, small to large
    large: Sequence[str]  # names of large models to choose from
    small: Sequence[str]
    methods: Mapping[str, Any]  # ways to sample by name, each with its usual num_steps
    subjects: Sequence[str]
    examples: Sequence[tuple[str, int]]
    default: Request

    def available(self) -> bool:
        """Whether to show the tab."""

    def note(self, request: Request) -> str:
        """What has to be done before sampling; empty if nothing."""

    def known(self, request: Request) -> list[Point]:
        """Schedules whose quality was measured before at these settings."""

    def command(self, request: Request, schedules: Sequence[StitchSchedule]) -> str:
        """What makes the same pictures in a terminal."""

    def sample(self, request: Request, schedules: Sequence[StitchSchedule], watch: Watch) -> Iterator[list[Sample]]:
        """Sample the large model alone and every schedule from the same noise; yields what is ready so far."""
