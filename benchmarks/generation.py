"""What a run of the FID generator costs as it grows: with its pictures, its steps, its ranks; and what memory it takes, and how busy it keeps the device.

    python benchmarks/generation.py                                          # the bundled emoji models
    python benchmarks/generation.py --preset imagenet256 --dtype bf16 --num-fid-samples 512 --per-proc-batch-size 64 --device cuda

Cost is linear where the largest of three runs lies on the line through the two smaller ones, whatever starting costs: `speed / line` is then 1. Two ranks
should together take the seconds of one. On a CPU the seconds are those of the CPU, over all ranks, so that other work on the machine does not count; on a
GPU those of a clock. Memory is what a process with denoisers that compute nothing takes for 50 times as many pictures of 4x4 pixels.

Each run is a process of its own, with the flags of the generator; --num-fid-samples and --num-sampling-steps are those of the smallest.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import Comparison
from benchmarks.record import Record, add_bench_args
from benchmarks.train_speed import forget_peak, peak_resident
from dit.checkpoints import load_denoisers
from tstitch.autoencoder import Autoencoder
from tstitch.cli import new_parser, positive_int, run, sampling_plan
from tstitch.errors import InputError
from tstitch.files import read_json, write_json
from tstitch.generate import add_generation_args, generate, join_ranks
from tstitch.schedule import StitchSchedule

TINY = ["--preset", "emoji", "--vae", "none", "--image-size", "4", "--cfg-scale", "1", "--num-sampling-steps", "2"]


class Size(NamedTuple):
    """What a run makes."""

    images: int
    steps: int
    ranks: int = 1

    def __str__(self) -> str:
        return f"{self.images} pictures, {self.steps} steps" + (f", {self.ranks} ranks" if self.ranks > 1 else "")


class Nothing:
    """A denoiser that computes nothing."""

    latent_shape = (3, 4, 4)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Zeros like x (N, C, H, W)."""
        return torch.zeros_like(x)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--few", type=positive_int, default=1000, metavar="N", help="pictures of the small run whose memory is measured")
    parser.add_argument("--times", type=positive_int, default=50, help="how many times as many the large one makes")
    parser.add_argument("--ranks", type=positive_int, default=2, help="processes of the run that is compared with one of a single process")
    parser.add_argument("--report", type=Path, metavar="DIR", help="generate, and write what it cost there; used by the script itself")
    parser.add_argument("--nothing", action="store_true", help="with denoisers that compute nothing; used by the script itself")
    add_generation_args(parser, Path("samples/benchmark"))
    add_bench_args(parser, rounds=3)
    parser.set_defaults(preset="emoji", num_images=64, num_sampling_steps=5, per_proc_batch_size=16)
    return parser.parse_args(argv)


def generate_and_report(args: argparse.Namespace) -> None:
    """One rank of a run: generate, write seconds, share of the time for which the device was busy, and MiB that the resident set grew by."""
    with join_ranks() as ranks:
        plan = sampling_plan(args, fid=True)
        files = [plan.preset.denoisers[0], plan.preset.denoisers[-1]]
        clock = time.process_time if plan.device.type == "cpu" else time.perf_counter
        denoisers = [Nothing(), Nothing()] if args.nothing else load_denoisers(plan, files)
        Autoencoder(plan.vae, plan.device)  # libraries are loaded before the clock starts
        before, start = forget_peak(), clock()
        busy = generate(ranks, args, plan, files, {"ratio_0.50": StitchSchedule.from_ratio(0.5)}, lambda plan, files: denoisers)
        report = {"seconds": clock() - start, "on_gpu": plan.device.type != "cpu", "busy": busy, "peak_mib": (peak_resident() - before) / 2**20}
        write_json(args.report / f"{ranks.rank}.json", report)


def measure(words: list[str], size: Size) -> dict[str, float]:
    """Generate in processes of their own.

    Args:
        words: flags of the generator; those of `size` come after them.

    Raises:
        InputError: if the run fails, with the last line of what it said.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size.ranks)] if size.ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, "--num-fid-samples", str(size.images), "--num-sampling-steps", str(size.steps)]
        words += ["--sample-dir", str(Path(folder) / "samples"), "--report", folder]
        done = subprocess.run([sys.executable, *launch, __file__, *words], capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"the run with {size} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        reports = [read_json(Path(folder) / f"{rank}.json") for rank in range(size.ranks)]
    in_parallel = max if reports[0]["on_gpu"] else sum
    return {
        "seconds": in_parallel(report["seconds"] for report in reports),
        "busy": min(report["busy"] for report in reports),
        "peak_mib": max(report["peak_mib"] for report in reports),
    }


def measure_all(words: list[str], sizes: list[Size], rounds: int) -> tuple[Comparison, dict[str, dict[str, Any]]]:
    """Runs in turn, round after round: their seconds, and what else is told of each."""
    found: dict[str, list[dict[str, float]]] = {str(size): [] for size in sizes}
    for _ in tqdm(range(rounds), desc=f"up to {sizes[-1]}", unit="round"):
        for size in sizes:
            found[str(size)].append(measure(words, size))
    notes = {
        name: {"device busy": round(statistics.median(r["busy"] for r in runs), 3), "peak MiB": round(max(r["peak_mib"] for r in runs), 1)}
        for name, runs in found.items()
    }
    return Comparison({name: [run["seconds"] for run in runs] for name, runs in found.items()}), notes


def add_line(comparison: Comparison, sizes: list[Size], along: str) -> dict[str, dict[str, str]]:
    """Add the largest run as the line through the two others has it; who is compared with it, as `Record.add` wants to be told."""
    a, b, c = (getattr(size, along) for size in sizes)
    first, second, _ = (comparison.seconds[str(size)] for size in sizes)
    comparison.reckoned["line through the two"] = [x + (y - x) * (c - a) / (b - a) for x, y in zip(first, second, strict=True)]
    return {str(sizes[-1]): {"line": "line through the two"}}


def main(argv: list[str] | None = None) -> None:
    """Grow a run in each direction, write each as a case, print all."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.report is not None:
        generate_and_report(args)
        return
    record, n, steps = Record("generation", args), args.num_images, args.num_sampling_steps
    settings = sampling_plan(args, fid=True).settings
    for along, sizes in (("images", [Size(n, steps), Size(2 * n, steps), Size(4 * n, steps)]), ("steps", [Size(n, k * steps) for k in (1, 2, 4)])):
        comparison, notes = measure_all(argv, sizes, args.rounds)
        record.add(f"growing {along}", comparison, against=add_line(comparison, sizes, along), settings=settings, notes=notes)
    sizes = [Size(4 * n, steps), Size(4 * n, steps, args.ranks)]
    comparison, notes = measure_all(argv, sizes, args.rounds)
    record.add("growing ranks", comparison, against={str(sizes[1]): {"one rank": str(sizes[0])}}, settings=settings, notes=notes)
    sizes = [Size(args.few, 2), Size(args.few * args.times, 2)]
    comparison, notes = measure_all([*argv, *TINY, "--nothing"], sizes, 1)
    for columns in notes.values():
        del columns["device busy"]  # with nothing
    record.add("memory", comparison, against={}, settings={"image_size": 4}, notes=notes)
    record.show()


if __name__ == "__main__":
    run(main)
