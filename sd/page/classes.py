"""Backbones of labels on the page. Another one is a function like `dit_parts` and an entry of `class_backbones`.

They go through their script's own command line: the page writes the arguments, the script's parser reads them, and the user sees them as the command that
makes the same pictures.
"""

from __future__ import annotations

import argparse
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from dit import sample_t_stitch as dit_script
from dit.checkpoints import load_denoisers
from ldm.cli import ldm_plan
from ldm.scripts import sample_imagenet_32_t_stitch as ldm_script
from sd.page.drawings import Point
from sd.page.request import Request, Sample, Watch, difference, large_alone, sheet
from sit import sample_t_stitch as sit_script
from sit.checkpoints import flow_plan, load_flows, mark_dits
from sit.cli import given_words
from tstitch.autoencoder import Autoencoder
from tstitch.cli import SamplingPlan, sampling_plan, stitched_files
from tstitch.errors import InputError
from tstitch.guidance import Denoiser
from tstitch.presets import LDM_PRESETS, PRESETS, SIT_PRESETS, DenoiserFile, Preset
from tstitch.results import quality_by_schedule, weight_hashes
from tstitch.schedule import StitchSchedule
from tstitch.tradeoff import compare
from tstitch.walker import Walked, Walker, total_seconds

EVERY_CLASS = "One of each kind"


class Method(NamedTuple):
    """A way to sample: what the script calls it, and the steps it is shown with."""

    arguments: tuple[str, ...] = ()
    num_steps: int = 20
    times: int = 0  # what --num-sampling-steps counts besides the steps: a grid of times has one more


@dataclass(frozen=True)
class WatchedWalker:
    """A walker that says how far it is, and can be stopped between two evaluations."""

    walker: Walker
    watch: Watch

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (num_steps, settings, work, ...: as they are)
        return getattr(self.walker, name)

    def evaluation_seconds(self, denoisers: Sequence[Denoiser], *args, **kwargs) -> list[float]:
        """As the walker; the seconds are kept, since they say how much of the work an evaluation is."""
        self.watch(0.0, "measuring the models")
        seconds = self.walker.evaluation_seconds(denoisers, *args, **kwargs)
        object.__setattr__(self, "_seconds", seconds)
        return seconds

    def walk(self, denoisers: Sequence[Denoiser], *args, schedules: Sequence[StitchSchedule], callback: Callable[[int, float], None], **kwargs) -> Walked:
        """As the walker."""
        seconds = self._seconds
        work = total_seconds(self.walker.work(schedules, len(denoisers)), seconds)
        done = 0.0

        def on_evaluation(denoiser: int, evaluations: float) -> None:
            nonlocal done
            done += evaluations * seconds[denoiser]
            self.watch(min(1.0, done / work), "sampling")
            callback(denoiser, evaluations)

        return self.walker.walk(denoisers, *args, schedules=schedules, callback=on_evaluation, **kwargs)


class Parts(NamedTuple):
    """What a script makes of its command line."""

    plan: SamplingPlan
    files: Sequence[DenoiserFile]
    load: Callable[[], list[Denoiser]]


def dit_parts(args: argparse.Namespace, three: bool) -> Parts:
    """As dit/sample_t_stitch.py."""
    plan = sampling_plan(args)
    files = stitched_files(args, plan, three=three)
    return Parts(plan, files, lambda: load_denoisers(plan, files))


def sit_parts(args: argparse.Namespace, three: bool) -> Parts:
    """As sit/sample_t_stitch.py."""
    plan = sampling_plan(args, presets=SIT_PRESETS, diffusion=False)
    files = mark_dits(args, stitched_files(args, plan, three=three))
    plan = flow_plan(args, plan, files)
    return Parts(plan, files, lambda: load_flows(plan, files, given_words(args)))


def ldm_parts(args: argparse.Namespace, three: bool) -> Parts:
    """As ldm/scripts/sample_imagenet_32_t_stitch.py, which knows pairs alone."""
    plan, files, load = ldm_plan(args)
    return Parts(plan, files, lambda: load(plan, files))


@dataclass(frozen=True)
class ClassBackbone:
    """Denoisers of labels, through the functions of their script.

    Args:
        script: what the user would type.
        parse_args: the script's.
        parts: what the script makes of its arguments.
        methods: ways to sample by the name they are shown with, the default first.
        common: arguments of every run.
        every: the script's word for all ratios.
    """

    title: str
    sentence: str
    script: str
    parse_args: Callable[[list[str]], argparse.Namespace]
    parts: Callable[[argparse.Namespace, bool], Parts]
    preset: Preset
    methods: Mapping[str, Method]
    common: tuple[str, ...] = ()
    every: str = "--all_tradeoffs"
    count: int = 4
    max_steps: int = 100
    max_guidance: float = 10.0
    max_count: int = 16
    prompts: bool = False
    bundled: bool = True
    large: Sequence[str] = ()  # there is nothing to choose
    small: Sequence[str] = ()
    _loaded: dict[Any, Any] = field(default_factory=dict, compare=False)
    _lock: Any = field(default_factory=threading.Lock, compare=False)

    @property
    def letters(self) -> list[str]:
        """Small to large."""
        return [file.letter for file in self.preset.denoisers]

    @property
    def subjects(self) -> list[str]:
        """What the pictures can be of."""
        return [*self.preset.class_names, EVERY_CLASS]

    @property
    def default(self) -> Request:
        """What the page opens with."""
        method = next(iter(self.methods))
        return Request(self.subjects[0], 0, self.methods[method].num_steps, self.preset.cfg_scale, self.count, method)

    @property
    def examples(self) -> list[tuple[str, int]]:
        """Subjects and seeds to try."""
        return [(EVERY_CLASS, 0), (self.subjects[0], 3), (self.subjects[1], 5), (self.subjects[7], 2), (self.subjects[8], 1)]

    def available(self) -> bool:
        """Whether the weights are here."""
        return all(file.path.exists() for file in self.preset.denoisers)

    def note(self, request: Request) -> str:
        """What has to be done before sampling: nothing."""
        return ""

    def arguments(self, request: Request) -> list[str]:
        """The script's command line, without the schedules."""
        if request.subject not in self.subjects:
            raise InputError(f"unknown kind of picture '{request.subject}'; choose one of the list")
        every = request.subject == EVERY_CLASS
        labels = range(self.preset.num_classes) if every else [self.subjects.index(request.subject)]
        method = self.methods[request.method]
        return [
            *method.arguments, "--preset", self.preset.name, "--class-labels", *map(str, labels), "--num-images", str(request.count),
            "--num-sampling-steps", str(request.num_steps + method.times), "--cfg-scale", f"{request.guidance:g}", "--seed", str(request.seed),
        ]  # fmt: skip

    def command(self, request: Request, schedules: Sequence[StitchSchedule]) -> str:
        """What makes the same pictures in a terminal."""
        if len(schedules) > 1:
            stitch = [self.every]
        elif len(schedules[0].fractions) == 3:
            stitch = ["--three_combo", *(f"{f:g}" for f in schedules[0].fractions)]
        else:
            stitch = ["--ratio", f"{schedules[0].fractions[0]:g}"]
        return f"python {self.script} {shlex.join([*self.arguments(request), *stitch])}"

    def sample(self, request: Request, schedules: Sequence[StitchSchedule], watch: Watch) -> Iterator[list[Sample]]:
        """Sample the large model alone and every schedule from the same noise; yields what is ready so far, which here is all at once.

        Raises:
            InputError: if the request cannot be met.
        """
        three = len(schedules[0].fractions) == 3
        parts = self.parts(self.parse_args([*self.arguments(request), *self.common]), three)
        watch(0.0, "loading the models")
        denoisers, autoencoder = self._load(parts, three)
        large = large_alone(len(parts.files))
        schedules = [large, *(schedule for schedule in schedules if schedule.fractions != large.fractions)]
        walker = WatchedWalker(parts.plan.walker, watch)
        comparison = compare(replace(parts.plan, walker=walker), denoisers, parts.files, schedules, autoencoder)
        reference, images = comparison.images[:, 0], comparison.images.unbind(1)
        yield [
            Sample(schedule, row.name, sheet(each), row.seconds_per_image, row.speed_up, difference(each, reference), row.fd_emoji)
            for schedule, row, each in zip(schedules, comparison.rows, images, strict=True)
        ]

    def _load(self, parts: Parts, three: bool) -> tuple[list[Denoiser], Autoencoder]:
        with self._lock:
            if three not in self._loaded:
                self._loaded[three] = parts.load()
            if "vae" not in self._loaded:
                self._loaded["vae"] = Autoencoder(parts.plan.vae, parts.plan.device)
            return self._loaded[three], self._loaded["vae"]

    def known(self, request: Request) -> list[Point]:
        """Schedules that were measured before at these settings."""
        parts = self.parts(self.parse_args([*self.arguments(request), *self.common]), len(self.letters) == 3)
        hashes = weight_hashes(parts.plan, parts.files)
        tables = [quality_by_schedule(self.preset.results, parts.plan.settings, hashes, metric)[1] for metric in ("sampling_speed_up", "fd_emoji")]
        return [Point(name, tables[0][name], loss) for name, loss in tables[1].items()]


def class_backbones(device: str, dtype: str) -> list[ClassBackbone]:
    """The backbones of labels; those whose weights are here get a tab.

    Args:
        device: as --device of their scripts.
        dtype: as --dtype.
    """
    common = ("--device", device, "--dtype", dtype)
    return [
        ClassBackbone(
            "DiT emoji", "Diffusion transformers, class-conditional: small, base and large, bundled.", "dit/sample_t_stitch.py",
            dit_script.parse_args, dit_parts, PRESETS["emoji"],
            {"DDIM": Method(), "DPM-Solver++": Method(("--solver", "dpm++"), 10), "DDPM": Method(("--solver", "ddpm"), 50)}, common,
        ),
        ClassBackbone(
            "SiT emoji", "Flow models (interpolant transformers) along an ODE or an SDE: small and large, bundled.", "sit/sample_t_stitch.py",
            sit_script.parse_args, sit_parts, SIT_PRESETS["emoji"],
            {
                "ODE, Heun": Method(("ODE", "--sampling-method", "heun2"), 10, times=1),
                "ODE, Euler": Method(("ODE", "--sampling-method", "euler"), 20, times=1),
                "SDE, Euler": Method(("SDE",), 21),
            }, common,
        ),
        ClassBackbone(
            "LDM emoji", "Latent diffusion U-Nets, class-conditional: small and large, bundled.", "ldm/scripts/sample_imagenet_32_t_stitch.py",
            ldm_script.parse_args, ldm_parts, LDM_PRESETS["emoji"],
            {
                "DDIM": Method(), "PLMS": Method(("--solver", "plms")), "DPM-Solver++": Method(("--solver", "dpm++"), 10),
                "DDIM, eta 1": Method(("--ddim_eta", "1"), 50),
            }, common, every="--all_ratios",
        ),
    ]  # fmt: skip
