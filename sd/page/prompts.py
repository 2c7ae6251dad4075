"""Backbones of prompts on the page: stitched diffusers pipelines, bundled or fetched."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache

from sd.demo import sample
from sd.page.drawings import Point
from sd.page.request import Request, Sample, Watch, difference, large_alone, sheet
from sd.tstitch_sd_utils import (
    EMOJI,
    LARGE_LCM_LORA,
    LARGE_SDXL,
    SMALL_LCM_LORA,
    SMALL_SDXL,
    get_tstitch_pipepline,
    get_tstitch_pipepline_sdxl,
    get_tstitch_pipepline_sdxl_lcm_lora,
)
from tstitch.cli import DTYPES
from tstitch.errors import InputError
from tstitch.presets import ROOT
from tstitch.schedule import StitchSchedule

PLACE = ROOT / "pretrained_models"  # a model's folder here goes before the hub


@dataclass(frozen=True)
class PromptBackbone:
    """A stitched diffusers pipeline.

    Args:
        build: makes the pipeline of a large and a small model.
        large: models to choose from, the default first.
        small: likewise.
        examples: prompts and seeds to try.
        besides: models that `build` needs besides.
        bundled: the weights are part of the repository: the tab is shown only where they are, and there is nothing to choose.
        size: what fetching the weights takes.
    """

    title: str
    sentence: str
    script: str
    build: Callable[[str, str], DiffusionPipeline]
    large: Sequence[str]
    small: Sequence[str]
    examples: Sequence[tuple[str, int]]
    besides: Sequence[str] = ()
    bundled: bool = False
    size: str = ""
    num_steps: int = 50
    guidance: float = 7.5
    count: int = 1
    max_steps: int = 100
    max_guidance: float = 20.0
    max_count: int = 4
    prompts: bool = True
    letters: Sequence[str] = ("S", "L")
    subjects: Sequence[str] = ()
    methods: Mapping[str, Any] = field(default_factory=dict)
    _loaded: dict[tuple[str, str], DiffusionPipeline] = field(default_factory=dict, compare=False)
    _lock: Any = field(default_factory=threading.Lock, compare=False)

    @property
    def default(self) -> Request:
        """What the page opens with."""
        prompt, seed = self.examples[0]
        return Request(prompt, seed, self.num_steps, self.guidance, self.count, large=self.large[0], small=self.small[0])

    def available(self) -> bool:
        """Whether the weights are here, or can be fetched."""
        return not self.bundled or is_here(self.large[0])

    def missing(self, request: Request) -> list[str]:
        """Models that are not on this machine."""
        return [name for name in (request.large, request.small, *self.besides) if not is_here(name)]

    def note(self, request: Request) -> str:
        """Which weights are not on this machine, and what to do; empty where all are."""
        missing = self.missing(request)
        if not missing:
            return ""
        folders = ", ".join(f"`pretrained_models/{name}`" for name in missing)
        return (
            f"**Not on this machine yet:** {', '.join(missing)}. With a network, Generate fetches what is missing ({self.size} in all). "
            f"Without one, copy it in diffusers format to {folders}, and open this page again."
        )

    def command(self, request: Request, schedules: Sequence[StitchSchedule]) -> str:
        """What makes the same pictures in a terminal."""
        words = {
            "--prompt": [request.subject], "--negative_prompt": [request.negative_prompt] if request.negative_prompt else [],
            "--ratios": [f"{r:g}" for r in dict.fromkeys([0.0, *(schedule.fractions[0] for schedule in schedules)])],
            "--num-images": [str(request.count)], "--steps": [str(request.num_steps)], "--guidance": [f"{request.guidance:g}"],
            "--seed": [str(request.seed)], "--large": ["emoji"] if self.bundled else [request.large], "--small": [] if self.bundled else [request.small],
        }  # fmt: skip
        return f"python {self.script} " + " ".join(f"{word} {shlex.join(values)}" for word, values in words.items() if values)

    def known(self, request: Request) -> list[Point]:
        """No quality was measured before."""
        return []

    def sample(self, request: Request, schedules: Sequence[StitchSchedule], watch: Watch) -> Iterator[list[Sample]]:
        """Sample the large model alone and every schedule from the same noise; yields after each schedule what is ready so far.

        Raises:
            InputError: if the weights cannot be had.
        """
        large = large_alone(len(self.letters))
        schedules = [large, *(schedule for schedule in schedules if schedule.fractions != large.fractions)]
        prompts, seeds = [request.subject] * request.count, range(request.seed, request.seed + request.count)
        call = {"negative_prompt": request.negative_prompt, "num_inference_steps": request.num_steps, "guidance_scale": request.guidance}
        samples: list[Sample] = []
        watch(0.0, "waiting for the models")
        with self._lock:  # a pipeline keeps the state of its scheduler, so it serves one at a time
            watch(0.0, "fetching the models" if self.missing(request) else "loading the models")
            pipe = self._pipeline(request)
            # A browser often shares the cores of a laptop: ratios are those of the time that this process had.
            clock = time.process_time if pipe.device.type == "cpu" else time.perf_counter
            for k, schedule in enumerate(schedules):

                def on_step(pipe: DiffusionPipeline, i: int, t: Any, kwargs: dict, k: int = k) -> dict:  # noqa: ANN401  (a pipeline's callback)
                    watch(min(1.0, (k + (i + 1) / request.num_steps) / len(schedules)), f"ratio {schedules[k].fractions[0]:g}")
                    return kwargs

                start, had = time.perf_counter(), clock()
                pictures = sample(pipe, prompts, seeds, ratio=schedule.fractions[0], callback_on_step_end=on_step, **call)
                seconds, had = (time.perf_counter() - start) / request.count, clock() - had
                if k == 0:
                    reference, alone = pictures, had
                samples.append(Sample(schedule, schedule.describe(self.letters), sheet(pictures), seconds, alone / had, difference(pictures, reference)))
                yield list(samples)

    def _pipeline(self, request: Request) -> DiffusionPipeline:
        key = (request.large, request.small)
        if key not in self._loaded:
            self._loaded.clear()  # two large models may not fit
            missing = self.missing(request)
            try:
                pipe = self.build(*key)
            except InputError as error:
                if not missing:
                    raise
                raise InputError(f"could not fetch {', '.join(missing)}; connect to the network, or copy what is missing as the note says") from error
            pipe.set_progress_bar_config(disable=True)
            for ratio in (0.0, 1.0):  # the first call of a model prepares kernels, and times are shown
                sample(pipe, [request.subject], [0], ratio=ratio, num_inference_steps=2)
            self._loaded[key] = pipe
        return self._loaded[key]


def is_here(name: str) -> bool:
    """Whether a model is in its folder, or in the hub's cache, complete enough to try."""
    files = ("model_index.json", "pytorch_lora_weights.safetensors")
    return (PLACE / name).is_dir() or any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def local(name: str) -> str:
    """A model's folder in pretrained_models if it is there, else its hub name."""
    return str(PLACE / name) if (PLACE / name).is_dir() else name


def prompt_backbones(device: str, dtype: str | None) -> list[PromptBackbone]:
    """The backbones of prompts.

    Args:
        device: name of a torch device.
        dtype: key of DTYPES; None is fp16 on cuda, else fp32.
    """
    how = {"device": device, "dtype": dtype and DTYPES[dtype]}
    emoji = f"emoji/{(EMOJI / 'sd').name}"
    return [
        PromptBackbone(
            "SD emoji", "Stable Diffusion in miniature: emoji from words, a small and a large U-Net, bundled.", "sd/sd_demo.py",
            lambda large, small: get_tstitch_pipepline("emoji", **how), [emoji], [emoji],
            [("red heart", 0), ("dog face, twitter style", 1), ("smiling face with sunglasses", 2), ("blue circle", 3)],
            bundled=True, num_steps=20, guidance=3.0, count=4, max_count=16,
        ),
        PromptBackbone(
            "Stable Diffusion", "Stable Diffusion 1.x, or a stylised model of its family, after a small model distilled from it.", "sd/sd_demo.py",
            lambda large, small: get_tstitch_pipepline(local(large), local(small), **how),
            [
                "stable-diffusion-v1-5/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4", "Envvi/Inkpunk-Diffusion", "nitrosocke/Ghibli-Diffusion",
                "nota-ai/bk-sdm-base",
            ],
            ["nota-ai/bk-sdm-tiny", "nota-ai/bk-sdm-small"],
            [
                ("a winding river through autumn forests from above, red and orange leaves", 0), ("ghibli style castle on a hill, morning light", 1),
                ("a fox in the snow, nvinkpunk style", 2),
            ],
            size="about 5 GB",
        ),
        PromptBackbone(
            "SDXL", "Stable Diffusion XL after SSD-1B, a model distilled from it.", "sd/sdxl_demo.py",
            lambda large, small: get_tstitch_pipepline_sdxl(local(large), local(small), **how), [LARGE_SDXL], [SMALL_SDXL],
            [("concept art of a dragon over a town, clouds, painterly, highly detailed", 0), ("a glass house in a pine forest, photograph", 1)],
            size="about 10 GB in fp16",
        ),
        PromptBackbone(
            "SDXL-LCM", "SDXL and SSD-1B with LCM-LoRA: pictures in 2 to 8 steps.", "sd/sdxl_lcm_lora.py",
            lambda large, small: get_tstitch_pipepline_sdxl_lcm_lora(
                local(large), local(small), large_lora=local(LARGE_LCM_LORA), small_lora=local(SMALL_LCM_LORA), **how
            ),
            [LARGE_SDXL], [SMALL_SDXL], [("a lighthouse in a storm, oil painting", 0), ("a cup of coffee on a wooden table, photograph", 1)],
            besides=[LARGE_LCM_LORA, SMALL_LCM_LORA], size="about 11 GB in fp16", num_steps=4, guidance=1.0, max_steps=16, max_guidance=3.0,
        ),
    ]  # fmt: skip
