"""Generate pictures for FID: a range of seeds in, one ADM .npz for each schedule out, on any number of processes.

Picture i is made from global seed + i alone, to the last bit. A matrix product rounds differently in a batch of another size, so batches are fixed by
number: chunk c is pictures c*B ... c*B+B-1, walked along all schedules as one tree by whichever rank has it. So 1 rank and 64 ranks, and a run that was
killed and resumed, write the same bytes. B and the list of schedules belong to a sweep's identity, and so do the kind of device and, on CPUs, the
threads of a rank (OMP_NUM_THREADS, else 1): they decide in which order floats are summed. The number of ranks does not. With --compile a resumed run agrees
to rounding, not to the byte: what is compiled depends on the shapes met before.

A chunk is on disk for all schedules before it is marked; after a kill, what has no mark is made again. Ranks meet only to agree that their input is
usable; otherwise they share a folder, on a disk that all machines see.

The next chunk is sampled while the last one is decoded and written, so that the device never waits for a disk; at the end a run says for how much of the
time it was busy. Memory and the work for a chunk do not depend on how many there are.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from tstitch.autoencoder import Autoencoder
from tstitch.cli import MACHINE, OUTPUT, Load, SamplingPlan, YesNo, add_dry_run_arg, add_sampling_args, help_group, positive_int
from tstitch.dry_run import Files, picture_bytes, plan_sampling
from tstitch.errors import InputError
from tstitch.files import alone_in, check_folder
from tstitch.guidance import SizedDenoiser
from tstitch.noise import SampleNoise
from tstitch.presets import DenoiserFile
from tstitch.results import weight_hashes
from tstitch.sample_folder import SampleFolder
from tstitch.schedule import StitchSchedule
from tstitch.tune import wait_for
from tstitch.walker import Walked

NPZ_OVERHEAD = 256  # bytes of an .npz besides its pixels
WAITING_CHUNKS = 2  # sampled, but not yet on disk; bounds memory


def add_generation_args(parser: argparse.ArgumentParser, sample_dir: Path, *, diffusion: bool = True) -> None:
    """Add the words that the generators share, see `add_sampling_args`; `sampling_plan(args, fid=True)` and `generate` read them."""
    output = help_group(parser, OUTPUT)
    output.add_argument("--sample-dir", type=Path, default=sample_dir, help="folder to write, on a disk that all processes share")
    output.add_argument("--png", action="store_true", help="write every picture as a PNG too")
    add_sampling_args(parser, fid=True, diffusion=diffusion)
    machine = help_group(parser, MACHINE)
    machine.add_argument(
        "--per-proc-batch-size", type=positive_int, default=32, metavar="B", help="pictures that a process walks together; part of what decides the last bit"
    )
    machine.add_argument("--tf32", action=YesNo, default=True, help="TensorFloat-32 matrix products on GPUs: faster, less exact")
    add_dry_run_arg(parser)
    parser.set_defaults(max_batch=None)  # one branch of the tree at a time, so that B bounds memory


@dataclass(frozen=True)
class Ranks:
    """The processes that share the work: this one's number and how many there are."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401  (whatever pickles)
        """Each rank's value, in the order of ranks; waits for all of them."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Run a block that may refuse its input: what one rank refuses, all refuse with that rank's sentence, so that none waits for it in vain."""
        refusal = None
        try:
            yield
        except InputError as error:
            refusal = str(error)
        for message in self.gather(refusal):
            if message is not None:
                raise InputError(message)


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the other processes of torchrun; without torchrun there is one rank."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks(0, 1)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def fix_arithmetic(device: torch.device, tf32: bool) -> None:
    """Settle what else decides the last bits of a run: TensorFloat-32 on GPUs, and on CPUs as many threads with torchrun as without."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # what torchrun sets for its processes


def file_names(schedules: Sequence[StitchSchedule], files: Sequence[DenoiserFile]) -> dict[str, StitchSchedule]:
    """Name the schedules for their files: ratio_0.30 with two models, S0.4_B0.2_XL0.4 with more.

    Raises:
        InputError: if two schedules are the same.
    """
    named: dict[str, StitchSchedule] = {}
    for schedule in schedules:
        shares = [f"{share:.10g}" for share in schedule.fractions]
        if len(files) == 2:
            name = f"ratio_{shares[0]}" if len(shares[0]) > 4 else f"ratio_{schedule.fractions[0]:.2f}"
        else:
            name = "_".join(f"{files[k].letter}{share}" for k, share in zip(schedule.order, shares, strict=True))
        if name in named:
            raise InputError(f"{name} is asked for twice; name each schedule once")
        named[name] = schedule
    return named


def walk(plan: SamplingPlan, denoisers: Sequence[SizedDenoiser], schedules: Sequence[StitchSchedule], start: int, stop: int) -> Walked:
    """Walk pictures start..stop-1 along each schedule."""
    noise = SampleNoise(plan.noise.seeds[start:stop])
    return plan.walker.walk(
        denoisers,
        noise.latents(denoisers[0].latent_shape, plan.device),
        plan.labels[start:stop].to(plan.device, non_blocking=True),  # else a GPU would finish the last chunk before it is given the next
        schedules=schedules,
        guidance=plan.guidance,
        noise=noise,
        max_batch=plan.max_batch,
    )


def describe(args: argparse.Namespace, plan: SamplingPlan, files: Sequence[DenoiserFile], schedules: dict[str, StitchSchedule]) -> dict[str, Any]:
    """What decides the bytes of a sweep, and makes its results comparable; the number of ranks is not in it."""
    letters = [file.letter for file in files]
    return {
        "settings": plan.settings,
        "models": {file.letter: file.model for file in files},
        "posenc": getattr(args, "posenc", None),  # of a file that does not say it
        "weights": weight_hashes(plan, files),
        "schedules": {name: {"schedule": schedule.to_json(), "name": schedule.describe(letters)} for name, schedule in schedules.items()},
        "num_images": len(plan.labels),
        "seed": args.seed,
        "class_labels": args.class_labels,  # None: drawn from each picture's own seed
        "dtype": args.dtype,
        "tf32": args.tf32,
        "compile": plan.compile,
        "per_proc_batch_size": args.per_proc_batch_size,
        "max_batch": plan.max_batch,
        "png": args.png,
        "device": plan.device.type,
        "threads": torch.get_num_threads() if plan.device.type == "cpu" else None,
        "torch": torch.__version__,
    }


def generate(
    ranks: Ranks,
    args: argparse.Namespace,
    plan: SamplingPlan,
    files: Sequence[DenoiserFile],
    schedules: dict[str, StitchSchedule],
    load: Load,
) -> float | None:
    """Make the pictures of every schedule and write them to --sample-dir; every rank calls it.

    Args:
        args: what `add_generation_args` asked for.
        schedules: file name -> schedule over the denoisers of `files`.
        load: called as load(plan, files), gives the denoisers.

    Returns:
        Share of the time, from the first step to the last byte, for which this rank's device was busy; None if nothing was left to do.

    Raises:
        InputError: on all ranks, if weights are unusable or the folder belongs to another sweep.
    """
    fix_arithmetic(plan.device, args.tf32)
    folder = SampleFolder(args.sample_dir, list(schedules), len(plan.labels), plan.image_size, args.per_proc_batch_size, args.png)
    main = ranks.rank == 0
    left = ranks.gather(folder.left() if main else None)[0]
    config: dict[str, Any] = {}
    busy = None
    with ranks.agree():
        if main:
            check_folder(args.sample_dir)
        if left:
            denoisers, autoencoder = load(plan, files), Autoencoder(plan.vae, plan.device)
            for denoiser in denoisers:
                autoencoder.check_fit(denoiser.latent_shape, plan.image_size)
        if main:
            config = describe(args, plan, files, schedules)
            with alone_in(args.sample_dir) if args.sample_dir.exists() else nullcontext():  # before it is said what else may be removed
                folder.check(config)
    if plan.dry_run:
        if main and left:
            _plan_generation(args, plan, files, schedules, folder, left, denoisers, autoencoder, ranks.size)
        elif main:
            print(f"{args.sample_dir}: {len(schedules)} x {len(plan.labels)} pictures are all there; nothing is left to do")
        return None
    with ExitStack() as held:
        with ranks.agree():
            if main:
                held.enter_context(alone_in(args.sample_dir))
                if left:
                    folder.begin(config)
        if left:
            with ranks.agree():
                if not folder.marks.is_dir():
                    raise InputError(f"rank {ranks.rank} does not see {folder.work}; choose a --sample-dir on a disk that all machines share")

            def latents(chunk: int) -> list[Tensor]:
                return walk(plan, denoisers, list(schedules.values()), folder.chunks[chunk].start, folder.chunks[chunk].stop).latents

            busy = store(ranks, folder, left, latents, autoencoder)
        if main:
            folder.finish(config)
    if main:
        print(f"{args.sample_dir}: {len(schedules)} x {len(plan.labels)} pictures" + (f", device busy for at most {busy:.3f} of the time" if left else ""))
        if plan.recipe:
            print(f"recipe {plan.recipe.name}: against {plan.recipe.reference}, {plan.recipe.published} was published ({plan.recipe.source})")
    return busy


def _plan_generation(
    args: argparse.Namespace, plan: SamplingPlan, files: Sequence[DenoiserFile], schedules: dict[str, StitchSchedule], folder: SampleFolder,
    left: Sequence[int], denoisers: Sequence[SizedDenoiser], autoencoder: Autoencoder, ranks: int,
) -> None:  # fmt: skip
    """Answer --dry-run: what the chunks that are left will cost."""
    pixels = picture_bytes(plan, 1)
    output = [Files(f"{len(folder.unfinished)} .npz", len(folder.unfinished) * (pixels + NPZ_OVERHEAD), args.sample_dir)]
    output.append(Files("more while it runs", (len(folder.unfinished) + 1) * pixels - output[0].size, args.sample_dir, at_most=True))
    if args.png:
        output.append(Files("PNGs", len(schedules) * pixels, args.sample_dir, at_most=True))
    plan_sampling(
        plan, denoisers, files, list(schedules.values()), autoencoder, output, together=args.per_proc_batch_size,
        left=[len(folder.chunks[chunk]) for chunk in left], ranks=ranks,
        kept=WAITING_CHUNKS * len(schedules) * args.per_proc_batch_size * plan.image_size**2 * 3,
    )  # fmt: skip


class BusyTime:
    """Time for which a device computes; on a GPU by its own clock, since there a call returns before the work is done.

    What is counted as one piece counts whole: a GPU that waits between two kernels of a chunk, because the host is slow to start them, passes for busy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._seconds = device, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def work(self) -> Iterator[None]:
        """Count what is done inside a with block."""
        if self.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream(self.device))
            yield
            stop.record(torch.cuda.current_stream(self.device))
            self._events.append((start, stop))
        else:
            began = time.perf_counter()
            yield
            wait_for(self.device)
            self._seconds += time.perf_counter() - began

    def seconds(self) -> float:
        """Sum until now."""
        wait_for(self.device)
        return self._seconds + sum(start.elapsed_time(stop) for start, stop in self._events) / 1000  # which is in milliseconds


class Decoder:
    """Decodes chunks: in the writer's thread if there are means for that beside the sampling, a GPU's second stream or a core, else before it.

    Two threads that compute on the same cores only take turns, and spoil each other's caches. The pictures are the same either way.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder, self.device = autoencoder, autoencoder.device
        self.beside = self.device.type == "cuda" or (self.device.type == "cpu" and free_cores() > 0)  # MPS bears one thread
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def decode(self, latents: list[Tensor]) -> Iterable[Tensor]:
        """Pictures uint8 (n, 3, H, W) of each (n, C, h, w); called by the thread that samples, read by the one that writes."""
        if not self.beside:
            return [self.autoencoder.decode(x) for x in latents]
        if self._stream is None:
            return (self.autoencoder.decode(x) for x in latents)
        sampled = torch.cuda.Event()
        sampled.record(torch.cuda.current_stream(self.device))
        return self._on_stream(self._stream, latents, sampled)

    def _on_stream(self, stream: torch.cuda.Stream, latents: list[Tensor], sampled: torch.cuda.Event) -> Iterator[Tensor]:
        for x in latents:
            with torch.cuda.stream(stream):  # else each copy to the host would wait for all steps that are queued
                stream.wait_event(sampled)
                x.record_stream(stream)
                pictures = self.autoencoder.decode(x)
            yield pictures


def free_cores() -> int:
    """Cores of this machine that its ranks leave idle."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores - int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * torch.get_num_threads()


def store(ranks: Ranks, folder: SampleFolder, left: Sequence[int], latents: Callable[[int], list[Tensor]], autoencoder: Autoencoder) -> float:
    """Sample this rank's share of the chunks that are left, and write each beside the sampling of the next ones.

    Rank 0 shows the progress of all ranks and waits for them.

    Args:
        latents: chunk -> latents (n, C, h, w) for each schedule.

    Returns:
        Share of the time for which the thread that samples kept the device busy.
    """
    decoder, busy, waiting = Decoder(autoencoder), BusyTime(autoencoder.device), deque[Future[None]]()
    # Each rank marks its chunks in this order; only the next mark of each is looked for, else the work would grow with the square of the chunks.
    unmarked = [deque(left[rank :: ranks.size]) for rank in range(ranks.size)]
    total = folder.shape[0] * len(folder.names)
    bar = tqdm(
        total=total, initial=total - len(folder.names) * sum(len(folder.chunks[c]) for c in left), desc=folder.folder.name, unit="image",
        disable=ranks.rank != 0,
    )  # fmt: skip

    def look() -> None:
        for chunks in unmarked:
            while chunks and folder.is_marked(chunks[0]):
                bar.update(len(folder.chunks[chunks.popleft()]) * len(folder.names))

    began = time.perf_counter()
    with bar, ThreadPoolExecutor(1) as writer:
        for chunk in left[ranks.rank :: ranks.size]:
            with busy.work():
                pictures = decoder.decode(latents(chunk))
            waiting.append(writer.submit(folder.write, chunk, pictures))
            while len(waiting) > WAITING_CHUNKS:
                waiting.popleft().result()
            if ranks.rank == 0:
                look()
        for future in waiting:
            future.result()
        share = busy.seconds() / (time.perf_counter() - began)
        # Looked up, not met at a barrier, which would time out where one rank is slow.
        while ranks.rank == 0 and any(unmarked):
            look()
            time.sleep(0.2 if any(unmarked) else 0)
    return share
