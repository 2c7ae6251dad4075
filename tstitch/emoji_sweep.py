"""FD-emoji and IS-emoji of many schedules: every schedule sees the same noise and labels, and a killed sweep goes on to the same numbers.

Processes of torchrun share the chunks of pictures; each stores its own sums after each chunk, which are added at the end. A killed sweep may go on with
another number of processes. FD-emoji is comparable only with itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from tstitch.autoencoder import Autoencoder
from tstitch.checkpoints import file_hash
from tstitch.cli import MACHINE, MODELS, OUTPUT, STITCHING, Load, SamplingPlan, add_dry_run_arg, help_group, positive_int
from tstitch.dry_run import Files, plan_sampling
from tstitch.errors import InputError
from tstitch.files import atomic_path, check_file, check_folder, read_json, write_json
from tstitch.generate import Ranks, walk
from tstitch.guidance import SizedDenoiser
from tstitch.metrics import FeatureStatistics, frechet_distance
from tstitch.metrics.emoji import EmojiExtractor
from tstitch.metrics.extractors import ImageFeatures, create_extractor
from tstitch.metrics.scores import probability_sums, score_of_sums
from tstitch.noise import SampleNoise
from tstitch.plots import plot_tradeoff
from tstitch.presets import ROOT, DenoiserFile
from tstitch.results import markdown_table, weight_hashes
from tstitch.schedule import StitchSchedule
from tstitch.sweep import UNMEASURED
from tstitch.walker import total_seconds

MEASURED_PICTURES, MEASURED_REPEATS = 8, 15
METRIC = "FD-emoji: Frechet distance in the features of the bundled extractor; comparable only with itself"


def add_sweep_args(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the words of a sweep; `sweep` reads them. `name` makes the default folders."""
    output = help_group(parser, OUTPUT)
    output.add_argument("--out", type=Path, default=Path(f"results/{name}.json"), help="results file to write, .json, and a picture beside it, .png")
    output.add_argument("--work-dir", type=Path, default=Path(f"runs/{name}"), help="where sums wait for a resume")
    help_group(parser, MODELS).add_argument(
        "--models", type=Path, default=ROOT / "pretrained_models" / "emoji", metavar="FOLDER", help="folder of the feature extractor and its reference"
    )
    help_group(parser, MACHINE).add_argument("--chunk", type=positive_int, default=50, metavar="N", help="pictures walked together, by each process")
    add_dry_run_arg(parser)


def add_ratios_arg(parser: argparse.ArgumentParser) -> None:
    """Add which ratios of two models are swept; `choose_ratios` reads them."""
    help_group(parser, STITCHING).add_argument(
        "--ratios", type=float, nargs="+", metavar="R", default=[k / 10 for k in range(11)], help="the small model's shares of the steps, 0..1, 0 first"
    )


def choose_ratios(args: argparse.Namespace) -> list[StitchSchedule]:
    """Schedules of --ratios.

    Raises:
        InputError: if the first is not 0.
    """
    if args.ratios[0] != 0:
        raise InputError(f"--ratios begins with {args.ratios[0]:g}; begin with 0, the large model alone, which the others are compared with")
    return [StitchSchedule.from_ratio(ratio) for ratio in args.ratios]


def sweep(
    args: argparse.Namespace,
    ranks: Ranks,
    plan: SamplingPlan,
    files: Sequence[DenoiserFile],
    schedules: Sequence[StitchSchedule],
    load: Load,
) -> list[dict[str, Any]]:
    """Measure every schedule over all pictures and write --out; every process calls it.

    Args:
        schedules: over `files`; the first is what the others are compared with.
        load: called as load(plan, files), gives the denoisers.

    Returns:
        One row for each schedule, on the first process; [] on the others.

    Raises:
        InputError: on all processes, if something is missing, or the work folder belongs to another sweep.
    """
    plan = replace(plan, max_batch=plan.max_batch or UNMEASURED)  # a measured batch would be another after a kill, and so would the last bits
    with ranks.agree():
        if len(plan.labels) < 2:
            raise InputError("FD-emoji needs at least 2 images; pass a larger --num-images")
        if args.out.suffix != ".json":
            raise InputError(f"--out {args.out} must end in .json; the picture beside it takes the same name with .png")
        check_file(args.out)
        check_file(args.out.with_suffix(".png"))
        check_folder(args.work_dir)
        denoisers, autoencoder = load(plan, files), Autoencoder(plan.vae, plan.device)
        extractor = create_extractor("emoji", plan.device, args.models)
        reference = extractor.references()
        config = describe(args, plan, files, schedules)
        check_begun(args.work_dir, config)
        if not plan.dry_run:
            write_json(args.work_dir / "config.json", config)
        sums = Sums(args.work_dir, ranks.rank, len(schedules), len(files))

    main = ranks.rank == 0
    chunks = [range(start, min(start + args.chunk, len(plan.labels))) for start in range(0, len(plan.labels), args.chunk)]
    left = ranks.gather(sorted(set(range(len(chunks))) - finished_chunks(args.work_dir)) if main else None)[0]
    if plan.dry_run:
        if main:
            busy = max(1, min(ranks.size, len(left)))
            output = [
                Files("sums of features" + f" of {busy} processes" * (busy > 1), busy * sums.nbytes, args.work_dir),
                Files("results and a picture", 2e5, args.out.parent, at_most=True),
            ]
            plan_sampling(
                plan, denoisers, files, schedules, autoencoder, output, together=args.chunk, left=[len(chunks[c]) for c in left], judge=extractor.measure,
                ranks=ranks.size, measured=MEASURED_PICTURES * (MEASURED_REPEATS + 1),
            )  # fmt: skip
        return []
    with tqdm(total=len(chunks), initial=len(chunks) - len(left), desc=f"{len(schedules)} schedules", unit="chunk", disable=not main) as bar:
        for c in left[ranks.rank :: ranks.size]:
            walked = walk(plan, denoisers, schedules, chunks[c].start, chunks[c].stop)
            sums.count(c, len(chunks[c]), walked.evaluations, (extractor.measure(autoencoder.decode(latents)) for latents in walked.latents))
            store(sums)
            bar.update(len(finished_chunks(args.work_dir)) - bar.n if main else 1)
        # Looked up, not met at a barrier, which would time out where one process is slow.
        while main and bar.n < len(chunks):
            time.sleep(0.2)
            bar.update(len(finished_chunks(args.work_dir)) - bar.n)
    if not main:
        return []
    sums.add_others(args.work_dir)
    evaluations = (sums.evaluations / len(plan.labels)).tolist()
    rows = make_rows(schedules, [file.letter for file in files], sums, reference, evaluations, measure(plan, denoisers))
    write_json(
        args.out,
        {key: config[key] for key in ("settings", "weights", "seed", "dtype")}
        | {
            "models": {file.letter: file.path.stem for file in files},
            "num_images": len(plan.labels),
            "metric": METRIC,
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "device": str(plan.device),
            "rows": rows,
        },
    )
    return rows


def describe(args: argparse.Namespace, plan: SamplingPlan, files: Sequence[DenoiserFile], schedules: Sequence[StitchSchedule]) -> dict[str, Any]:
    """What the sums of a work folder belong to."""
    return {
        "settings": plan.settings,
        "weights": weight_hashes(plan, files) | {"features": file_hash(args.models / "features.safetensors")},
        "labels": plan.labels.tolist(),
        "seed": args.seed,
        "dtype": args.dtype,
        "chunk": args.chunk,
        "max_batch": plan.max_batch,
        "compile": plan.compile,
        "schedules": [schedule.to_json() for schedule in schedules],
    }


def show(out: Path, groups: dict[str, Sequence[dict[str, Any]]], title: str = "") -> None:
    """Print the table of `sweep`'s rows, and draw cost against quality beside the results file `out`; the first group is joined by a line."""
    rows = [row for group in groups.values() for row in group]
    if not rows:  # all processes but the first
        return
    print(sweep_table(rows))
    plot_tradeoff(
        out.with_suffix(".png"),
        {name: [(1 / row["sampling_speed_up"], row["fd_emoji"], row["name"]) for row in group] for name, group in groups.items()},
        xlabel="cost of sampling relative to the large model alone",
        ylabel="FD-emoji (comparable only with itself)",
        title=title,
        lines=list(groups)[:1],
    )


def check_begun(folder: Path, config: dict[str, Any]) -> None:
    """Hold a work folder that was begun to these settings.

    Raises:
        InputError: if it belongs to another sweep, naming what differs.
    """
    path = folder / "config.json"
    if path.exists():
        found = read_json(path)
        differ = [key for key in config if found.get(key) != config[key]]
        if differ:
            raise InputError(f"{folder} holds a sweep with other settings ({', '.join(differ)}); remove it or choose another --work-dir")


def finished_chunks(folder: Path) -> set[int]:
    """Numbers of the chunks that are in some process's sums."""
    done: set[int] = set()
    for path in folder.glob("sums_*.safetensors"):
        with safe_open(path, "np") as file:
            done |= set(file.get_tensor("done").tolist())
    return done


class Sums:
    """What a process has gathered over the chunks `done`: feature statistics, sums of class probabilities, and evaluations (schedules, denoisers)."""

    def __init__(self, folder: Path, rank: int, num_schedules: int, num_denoisers: int) -> None:
        self.path = folder / f"sums_{rank}.safetensors"
        self.done: list[int] = []
        self.statistics = [FeatureStatistics(EmojiExtractor.dim) for _ in range(num_schedules)]
        self.scores = [np.zeros(())] * num_schedules
        self.evaluations = np.zeros((num_schedules, num_denoisers))
        if self.path.exists():
            self.add(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of the feature statistics, which are all but a little of the file."""
        return sum(value.nbytes for statistics in self.statistics for value in statistics.totals.values())

    def count(self, chunk: int, size: int, evaluations: Sequence[Sequence[float]], features: Iterable[ImageFeatures]) -> None:
        """Add a chunk of `size` pictures: what each schedule cost a picture, and the features of its pictures."""
        for k, measured in enumerate(features):
            assert measured.probs is not None  # this network is a classifier
            self.statistics[k].update(measured.pool)
            self.scores[k] = self.scores[k] + probability_sums(measured.probs)
        self.evaluations += size * np.asarray(evaluations, dtype=np.float64)
        self.done.append(chunk)

    def add_others(self, folder: Path) -> None:
        """Add what the other processes have gathered."""
        for path in sorted(folder.glob("sums_*.safetensors")):
            if path != self.path:
                self.add(path)

    def add(self, path: Path) -> None:
        """Add what is stored in a file of the same sweep."""
        tensors = load_file(path)
        self.done += tensors["done"].tolist()
        self.evaluations = self.evaluations + tensors["evaluations"]
        for k, statistics in enumerate(self.statistics):
            self.scores[k] = self.scores[k] + tensors[f"{k}.probabilities"]
            statistics.totals = {name: statistics.totals[name] + tensors[f"{k}.{name}"] for name in statistics.totals}


def store(sums: Sums) -> None:
    """Write the sums of all schedules at once."""
    tensors = {f"{k}.{name}": np.asarray(value) for k, statistics in enumerate(sums.statistics) for name, value in statistics.totals.items()}
    tensors |= {f"{k}.probabilities": np.asarray(score) for k, score in enumerate(sums.scores)}
    with atomic_path(sums.path) as temporary:
        save_file(tensors | {"done": np.array(sums.done), "evaluations": sums.evaluations}, temporary)


def measure(plan: SamplingPlan, denoisers: Sequence[SizedDenoiser]) -> list[float]:
    """Seconds a picture of an evaluation of each denoiser, among several pictures."""
    n = MEASURED_PICTURES
    noise = SampleNoise(range(n))
    x, y = noise.latents(denoisers[0].latent_shape, plan.device), torch.arange(n, device=plan.device) % plan.num_classes
    return [seconds / n for seconds in plan.walker.evaluation_seconds(denoisers, x, y, guidance=plan.guidance, noise=noise, repeats=MEASURED_REPEATS)]


def make_rows(
    schedules: Sequence[StitchSchedule],
    letters: Sequence[str],
    sums: Sums,
    reference: dict[str, tuple[np.ndarray, np.ndarray]],
    evaluations: list[list[float]],
    seconds_each: Sequence[float],
) -> list[dict[str, Any]]:
    """One row for each schedule."""
    seconds = [total_seconds(each, seconds_each) for each in evaluations]
    quality = [{name: frechet_distance(gathered.mean, gathered.covariance, *reference[name]) for name in reference} for gathered in sums.statistics]
    return [
        {
            "schedule": schedule.to_json(),
            "name": schedule.describe(letters),
            "evaluations": evaluations[k],
            "seconds_per_image": seconds[k],
            "sampling_speed_up": seconds[0] / seconds[k],
            "fd_emoji": quality[k]["train"],
            "fd_emoji_held_out": quality[k]["held_out"],
            "fd_relative": quality[k]["train"] / quality[0]["train"] - 1,
            "is_emoji": score_of_sums(sums.scores[k]),
        }
        for k, schedule in enumerate(schedules)
    ]


def sweep_table(rows: Sequence[dict[str, Any]]) -> str:
    """Schedule, evaluations, speed-up and quality, as Markdown; a column that no row has is left out."""
    has_is = any("is_emoji" in row for row in rows)  # older results have none
    cells = [
        [
            row["name"],
            " + ".join(f"{n:.4g}" for n in row.get("evaluations", [])),
            f"{row['sampling_speed_up']:.2f}",
            f"{row['fd_emoji']:.2f}",
            f"{100 * row['fd_relative']:+.1f} %",
            f"{row['fd_emoji_held_out']:.2f}",
            *([f"{row['is_emoji']:.2f}" if "is_emoji" in row else ""] if has_is else []),
        ]
        for row in rows
    ]
    heads = ["schedule", "evaluations", "sampling speed-up", "FD-emoji", "against large alone", "FD-emoji, held-out reference"]
    return markdown_table([*heads, *(["IS-emoji"] if has_is else [])], cells)
