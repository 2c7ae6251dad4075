"""What a run will be and what it will cost, said before it: --dry-run.

A run is a few kinds of work, each done many times. One of each is done here, on this device, to count its FLOPs and to time it; how many there will be is
known from the schedules. So a plan takes seconds where the run takes hours, and reads the same files and refuses the same input. It writes nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tstitch.autoencoder import PIXELS, Autoencoder
from tstitch.cli import SamplingPlan
from tstitch.files import existing_folder
from tstitch.guidance import Denoiser, Guidance, SizedDenoiser
from tstitch.noise import SampleNoise
from tstitch.presets import DenoiserFile
from tstitch.schedule import StitchSchedule
from tstitch.sweep import UNMEASURED, BatchSize
from tstitch.tune import measure_seconds, peak_memory, wait_for

MEASURED_ON_CPU = 8  # most pictures of a call that is measured on a CPU, whose time goes with their number
REPEATS = 2
SHOWN = 6  # most schedules that are named
LONGEST_STEP, GROWTH = 10.0, 4  # seconds of a training step that is measured on a CPU, and how parts grow until then
LONGEST_LOOK = 60.0  # seconds that may be spent on finding out how many steps an adaptive method takes


def count_flops(call: Callable[[], object]) -> float:
    """FLOPs of the matrix products, convolutions and attention of a call, a multiplication and an addition being two.

    On a CPU torch's counter sees neither packed layers nor its own fused attention; here they count as the plain ones do.
    """
    with flop_counter() as counter:
        call()
    return counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """Torch's counter, told of what it does not see."""

    def attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(_: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *__: object, **___: object) -> int:
        # Five products: what the forward pass computed is computed again.
        return sdpa_flop_count(q, k, v) * 5 // 2

    def linear(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
        return 2 * x.numel() * weight[0]

    names = [
        ("aten", "_scaled_dot_product_flash_attention_for_cpu", attention), ("aten", "_scaled_dot_product_attention_math_for_mps", attention),
        ("aten", "_scaled_dot_product_flash_attention_for_cpu_backward", backward), ("mkldnn", "_linear_pointwise", linear),
    ]  # fmt: skip
    known: dict[Any, Any] = {getattr(getattr(torch.ops, space), name): formula for space, name, formula in names if hasattr(getattr(torch.ops, space), name)}
    return FlopCounterMode(display=False, custom_mapping=known)


@dataclass(frozen=True)
class Work:
    """One kind of work of a run.

    Args:
        name: what is shown.
        times: how often it is done in the whole run, by all processes together; None where nobody knows beforehand.
        flops: of one time.
        seconds: of one time, here.
        before: FLOPs that are done only once, before the first time.
        busiest: how often the process does it that does it most often; None for an even share.
    """

    name: str
    times: float | None
    flops: float
    seconds: float
    before: float = 0.0
    busiest: float | None = None

    @property
    def all_flops(self) -> float:
        """FLOPs of the whole run."""
        return 0.0 if self.times is None or not self.times else self.before + self.times * self.flops

    def seconds_among(self, ranks: int) -> float:
        """Seconds of the whole run, for the busiest of the processes that share it."""
        return self.seconds * ((self.times or 0) / ranks if self.busiest is None else self.busiest)


@dataclass(frozen=True)
class Files:
    """What a run writes: how many bytes, exactly or at most, into which folder."""

    what: str
    size: float
    folder: Path
    at_most: bool = False


def disk_lines(files: Sequence[Files]) -> list[str]:
    """What is written where, and whether its disk has room for all that goes onto it."""
    folders = [existing_folder(file.folder) for file in files]
    disks = [folder.stat().st_dev for folder in folders]
    lines = []
    for file, folder, disk in zip(files, folders, disks, strict=True):
        free = shutil.disk_usage(folder).free
        needed = sum(other.size for other, its_disk in zip(files, disks, strict=True) if its_disk == disk)
        enough = "" if free >= needed else f": NOT ENOUGH for the {show_bytes(needed)} that go there"
        lines.append(f"{'at most ' if file.at_most else ''}{show_bytes(file.size)}, {file.what} -> {file.folder} ({show_bytes(free)} free{enough})")
    return lines


def _scaled(value: float, units: str, unit: str) -> str:
    power = 0
    while value >= 1000 and power + 1 < len(units):
        value, power = value / 1000, power + 1
    return f"{value:.4g} {units[power].strip()}{unit}"


def show_flops(flops: float) -> str:
    """FLOPs in four digits, 1.234 TFLOP."""
    return _scaled(flops, " KMGTPE", "FLOP")


def show_bytes(size: float) -> str:
    """Bytes in four digits, 1.234 GB, of 10^9."""
    return _scaled(size, " kMGTP", "B")


def show_seconds(seconds: float) -> str:
    """A duration, in the unit that suits it."""
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def show_plan(about: Sequence[tuple[str, str]], works: Sequence[Work], *, how: str, memory: str, files: Sequence[Files], ranks: int = 1) -> None:
    """Print a plan: what it is about, then FLOPs, seconds, memory and disk.

    Args:
        about: names and texts of the first lines; a name is shown once for lines that follow each other.
        how: how the seconds were found.
        ranks: processes that share the work.
    """
    rows = [*about]
    known = [work for work in works if work.times is not None]
    total = sum(work.all_flops for work in known)
    seconds = [(work.name, work.seconds_among(ranks)) for work in known]
    if len(known) < len(works):
        open_ended = [work for work in works if work.times is None]
        rows.append(("FLOPs", "; ".join(f"{work.name} {show_flops(work.flops)} each time" for work in open_ended) + ", nobody knows how often"))
        rows.append(("time", "; ".join(f"{work.name} {show_seconds(work.seconds)} each time" for work in open_ended) + f", {how}"))
    else:
        done = [work for work in known if work.times]
        of_each = ", ".join(f"{work.name} {show_flops(work.all_flops)}" for work in done) or "nothing is left to do"
        rows.append(("FLOPs", f"{show_flops(total)}: {of_each}"))
        each = ", ".join(f"{name} {show_seconds(spent)}" for name, spent in seconds if spent) or "nothing is left to do"
        shared = f", the busiest of {ranks} processes" if ranks > 1 else ""
        rows.append(("time", f"about {show_seconds(sum(spent for _, spent in seconds))}{shared}: {each}; {how}"))
    rows.append(("memory", memory))
    rows += [("disk", line) for line in disk_lines(files)] or [("disk", "nothing")]
    width = max(len(name) for name, _ in rows)
    before = None
    for name, text in rows:
        print(f"{'' if name == before else name:{width}}  {text}")
        before = name
    print("dry run: nothing was written; leave --dry-run out to run it")


class Watch:
    """FLOPs and seconds of the calls of modules, inside a with block.

    Args:
        modules: name -> module.
        device: where they run.
        counter: one that is counting; None measures seconds alone.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], device: torch.device, counter: FlopCounterMode | None = None) -> None:
        self.modules, self.device, self.counter = modules, device, counter
        self.calls, self.flops, self.seconds = (dict.fromkeys(modules, 0.0) for _ in range(3))
        self._began = (0.0, 0.0)
        self._hooks: list[Any] = []

    def _now(self) -> tuple[float, float]:
        wait_for(self.device)
        return time.perf_counter(), 0.0 if self.counter is None else self.counter.get_total_flops()

    def __enter__(self) -> Watch:
        for name, module in self.modules.items():
            self._hooks += [module.register_forward_pre_hook(self._begin), module.register_forward_hook(partial(self._end, name))]
        return self

    def _begin(self, *_: object) -> None:
        self._began = self._now()

    def _end(self, name: str, *_: object) -> None:
        seconds, flops = self._now()
        self.calls[name] += 1
        self.seconds[name] += seconds - self._began[0]
        self.flops[name] += flops - self._began[1]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def show_memory(device: torch.device, weights: float, kept: float = 0, what: str = "weights", size: str = "") -> str:
    """Memory after one of each kind of work was done; `what` the bytes of `weights` are, `size` how large the work was beside the run's."""
    where = "allocated on the GPU at most" if device.type == "cuda" else "resident at most"
    more = f"; the run keeps about {show_bytes(kept)} more" if kept else ""
    return f"{show_bytes(peak_memory(device))} {where} while this was measured{size}, {show_bytes(weights)} of it {what}{more}"


def picture_bytes(plan: SamplingPlan, num_schedules: int) -> int:
    """Bytes of all pictures of a plan, uncompressed."""
    return num_schedules * len(plan.labels) * plan.image_size**2 * 3


def module_bytes(module: torch.nn.Module) -> float:
    """Bytes of the parameters and buffers of a module."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def parameter_count(denoiser: Denoiser) -> int:
    """Parameters of a denoiser; one whose weights are packed says it itself."""
    said = getattr(denoiser, "parameter_count", None)
    return sum(parameter.numel() for parameter in denoiser.parameters()) if said is None else said  # type: ignore[attr-defined]


class _Counted:
    """A guidance that counts the FLOPs of each evaluation, per sample."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance, self.flops = guidance, list[float]()

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, y: Tensor, progress: float) -> Tensor:
        answers: list[Tensor] = []
        self.flops.append(count_flops(lambda: answers.append(self.guidance(denoiser, x, t, y, progress))) / len(x))
        return answers[0]


@torch.no_grad()
def plan_sampling(
    plan: SamplingPlan,
    denoisers: Sequence[SizedDenoiser],
    files: Sequence[DenoiserFile],
    schedules: Sequence[StitchSchedule],
    autoencoder: Autoencoder,
    output: Sequence[Files],
    *,
    together: int | None = None,
    left: Sequence[int] | None = None,
    ranks: int = 1,
    measured: int = 0,
    prepared: int = 0,
    judge: Callable[[Tensor], object] | None = None,
    kept: float = 0,
) -> None:
    """Measure an evaluation of each denoiser, and print what sampling the schedules comes to.

    Args:
        output: what will be written.
        together: pictures that are walked together; None: all.
        left: pictures of each chunk that is still to be made; None: all pictures, by one process.
        ranks: processes that take turns in taking a chunk.
        measured: evaluations of a picture of each denoiser that one process makes besides, to measure them.
        prepared: pictures that it decodes besides, to prepare kernels.
        judge: what it does with pictures uint8 (N, 3, H, W) once they are decoded.
        kept: bytes of latents and pictures that the run holds at once.
    """

    def finish() -> None:
        pictures = autoencoder.decode(x)
        if judge is not None:
            judge(pictures)

    chunks = [len(plan.labels)] if left is None else left
    ranks = max(1, min(ranks, len(chunks)))
    count, share = sum(chunks), max(sum(chunks[rank::ranks]) for rank in range(ranks))
    together = min(together or len(plan.labels), len(plan.labels))
    most = plan.max_batch or UNMEASURED
    n = min(together, most, MEASURED_ON_CPU) if plan.device.type == "cpu" else min(together, most)
    called = min(together * len(schedules), plan.max_batch or BatchSize(None, plan.device).largest)  # most pictures in a call of the run
    noise, y = SampleNoise(plan.noise.seeds[:n]), plan.labels[:n].to(plan.device)
    x = noise.latents(denoisers[0].latent_shape, plan.device)
    flops = [_evaluation_flops(plan, denoiser, x, y, noise) for denoiser in denoisers]
    finish_flops = count_flops(finish) / n
    each = [seconds / n for seconds in plan.walker.evaluation_seconds(denoisers, x, y, guidance=plan.guidance, noise=noise, repeats=REPEATS)]
    (finish_seconds,) = measure_seconds([finish], plan.device, REPEATS)
    evaluations, source = _evaluations(plan, denoisers, schedules, x, y, max(each))
    letters = [file.letter for file in files]
    works = [
        Work(letter, None, last, each[k], n * (first - last))
        if evaluations is None
        else Work(letter, count * evaluations[k] + measured, last, each[k], n * (first - last), share * evaluations[k] + measured)
        for k, (letter, (first, last)) in enumerate(zip(letters, flops, strict=True))
    ]
    finished = "decoding" if judge is None else "decoding and features"
    works.append(Work(finished, count * len(schedules) + prepared, finish_flops, finish_seconds / n, busiest=share * len(schedules) + prepared))
    counts = [parameter_count(denoiser) for denoiser in denoisers]
    weights = sum(counts) * torch.finfo(plan.dtype).bits / 8 + module_bytes(autoencoder.vae)
    names = [schedule.describe(letters) for schedule in schedules]
    seeds = plan.noise.seeds
    pictures = f"{len(seeds)} of {plan.image_size}x{plan.image_size}, seeds {seeds[0]} to {seeds[-1]}"
    doubled = ", doubled by guidance" if plan.guidance.scale != 1 else ""
    show_plan(
        [
            *(("models", f"{file.letter}: {file.model}, {number / 1e6:.3g} M parameters, {file.path}") for file, number in zip(files, counts, strict=True)),
            ("", f"autoencoder: {autoencoder.source}") if autoencoder.source != PIXELS else ("", "no autoencoder: pixels"),
            ("pictures", pictures + ("" if count == len(seeds) else f", {count} of them are left to be made")),
            ("schedules", f"{len(names)}: {', '.join(names[:SHOWN])}" + (", ..." if len(names) > SHOWN else "")),
            ("sampling", _sampling_words(plan)),
            ("evaluations", f"{_listed(letters, evaluations)} a picture{doubled}, {source}"),
        ],
        works,
        how=f"an estimate from {n} picture{'s' if n > 1 else ''} at once on {plan.device}, without loading and writing",
        memory=show_memory(plan.device, weights, kept, size=f" at {n} of up to {called} pictures a call" if n < called else ""),
        files=output,
        ranks=ranks,
    )


def _listed(letters: Sequence[str], evaluations: Sequence[float] | None) -> str:
    return "unknown" if evaluations is None else ", ".join(f"{letter} {n:.4g}" for letter, n in zip(letters, evaluations, strict=True))


def _sampling_words(plan: SamplingPlan) -> str:
    settings = {name: value for name, value in plan.settings.items() if name not in ("preset", "image_size")}
    said = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"{said}; {str(plan.dtype).removeprefix('torch.')} on {plan.device}"


def _evaluation_flops(plan: SamplingPlan, denoiser: SizedDenoiser, x: Tensor, y: Tensor, noise: SampleNoise) -> tuple[float, float]:
    """FLOPs for a sample of the first guided evaluation, which may compute what later ones keep, and of a later one."""
    counted = _Counted(plan.guidance)
    plan.walker.evaluation_seconds([denoiser], x, y, guidance=counted, noise=noise, repeats=1)
    return counted.flops[0], counted.flops[-1]


def _evaluations(
    plan: SamplingPlan, denoisers: Sequence[SizedDenoiser], schedules: Sequence[StitchSchedule], x: Tensor, y: Tensor, seconds: float
) -> tuple[Sequence[float] | None, str]:
    """Evaluations that a picture needs along all schedules, by denoiser, and where the number comes from."""
    known = plan.walker.work(schedules, len(denoisers))
    if known is not None:
        alone = [plan.walker.work([schedule], len(denoisers)) or [] for schedule in schedules]
        return known, f"shared by the schedules; {sum(map(sum, alone)):.4g} without sharing" if len(schedules) > 1 else "as the schedule says"
    if 200 * seconds * len(schedules) > LONGEST_LOOK:
        return None, "the method chooses its own steps"
    walked = plan.walker.walk(
        denoisers, x[:1], y[:1], schedules=schedules, guidance=plan.guidance, noise=SampleNoise(plan.noise.seeds[:1]), max_batch=plan.max_batch
    )  # fmt: skip
    return [sum(counts) for counts in zip(*walked.evaluations, strict=True)], "as the first picture takes: the method chooses its own steps"


def plan_training(take: Callable[[int], object], whole: int, *, times: float | None, device: torch.device, processes: int = 1) -> tuple[list[Work], str]:
    """FLOPs and seconds of training, measured on a step forwards and backwards, and how they were.

    Args:
        take: take(size) does what a process does for one part of `size` items of an optimizer step.
        whole: items of a part.
        times: parts that all processes will compute, None where no end was named.
        processes: that take part; several must take the same steps, so those are whole.
    """
    size = 1 if device.type == "cpu" and processes == 1 else whole
    flops = count_flops(lambda: take(size)) / size
    measured = [(size, _one_time(take, size, device))]
    while size < whole and 2 * GROWTH * measured[-1][1] < LONGEST_STEP:
        size = min(GROWTH * size, whole)
        measured.append((size, _one_time(take, size, device)))
    seconds, how = measured[-1][1], "a step was measured"
    if size < whole:
        # A line through the last two: what a step costs whatever its size, and what an item costs.
        (fewer, before), (size, seconds) = measured[-2:] if len(measured) > 1 else [(0, 0.0), *measured]
        seconds += (whole - size) * max(0.0, seconds - before) / (size - fewer)
        how = f"derived from steps of up to {size} of {whole} items"
    return [Work("training", times, whole * flops, seconds)], f"{how}, on {device}"


def _one_time(take: Callable[[int], object], size: int, device: torch.device) -> float:
    return measure_seconds([lambda: take(size)], device, 1)[0]


def training_bytes(model: torch.nn.Module, moment: float = 4) -> float:
    """Bytes of weights, moving average and gradients in float32, and of AdamW's two moments, each of `moment` bytes a number."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return 8 * sum(parameter.numel() for parameter in model.parameters()) + (4 + 2 * moment) * trained


def training_memory(device: torch.device, size: float) -> str:
    """Memory after a step was taken, of which `training_bytes` are `size`."""
    return show_memory(device, size, what="weights, average, gradients and moments")


def checkpoint_files_of(model: torch.nn.Module, folder: Path, *, steps: int, every: int, keep: int, moment: float = 4) -> list[Files]:
    """Checkpoints of `tstitch.training.fit`: weights, moving average and AdamW's two moments, each of `every` steps and at the end; `keep` of them stay.

    Args:
        moment: bytes of a number of the moments.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    size = 2 * sum(value.numel() * value.element_size() for value in model.state_dict().values()) + 2 * moment * trained
    count = -(-steps // every)
    kept = min(keep, count)
    files = [Files(f"{kept} of {count} checkpoints of {show_bytes(size)} each, and the log", kept * size, folder)]
    return files + ([Files("one checkpoint more while it is written", size, folder)] if count > keep else [])
