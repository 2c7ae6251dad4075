"""Measure FD-emoji of stitched schedules: the 11 ratios of small and large, and three-model mixes.

    python dit/sweep_emoji.py --num-images 2000 --dtype bf16 --out pretrained_models/emoji/dit_results.json

Every schedule sees the same noise and the same labels (image i has seed + i and label i modulo 9). All schedules are walked as one tree, a chunk of
images at a time; after each chunk the statistics are stored, and a killed run goes on from there to the same numbers. FD-emoji is comparable only with
itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import load_denoisers
from dit.models import DiT
from tstitch.autoencoder import Autoencoder
from tstitch.checkpoints import file_hash
from tstitch.cli import SamplingPlan, add_sampling_args, new_parser, positive_int, run, sampling_plan
from tstitch.errors import InputError
from tstitch.files import atomic_path, check_folder, read_json, write_json
from tstitch.generate import walk
from tstitch.metrics import FeatureStatistics, frechet_distance
from tstitch.metrics.emoji import EmojiExtractor
from tstitch.metrics.extractors import create_extractor, gather
from tstitch.noise import SampleNoise
from tstitch.plots import plot_tradeoff
from tstitch.presets import ROOT
from tstitch.results import markdown_table
from tstitch.schedule import StitchSchedule, two_way_ratios
from tstitch.tune import measure_step_seconds, predict_seconds

# Shares of small, base and large in fifths: every mix in which all three take part.
THREE_MODEL_MIXES = tuple((a / 5, b / 5, (5 - a - b) / 5) for a in range(1, 4) for b in range(1, 5 - a))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/dit_emoji_sweep.json"), help="results file to write")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/dit-emoji-sweep"), help="where statistics wait for a resume")
    parser.add_argument("--chunk", type=positive_int, default=50, help="images walked together")
    parser.add_argument("--models", type=Path, default=ROOT / "pretrained_models" / "emoji", help="folder of the extractor and its reference")
    add_sampling_args(parser)
    parser.set_defaults(preset="emoji", num_images=2000, class_labels=list(range(9)))
    return parser.parse_args(argv)


def restore(work_dir: Path, config: dict, schedules: list[StitchSchedule]) -> tuple[int, list[FeatureStatistics]]:
    """Images done and statistics so far."""
    statistics = [FeatureStatistics(EmojiExtractor.dim) for _ in schedules]
    if not (work_dir / "statistics.safetensors").exists():
        write_json(work_dir / "config.json", config)
        return 0, statistics
    if read_json(work_dir / "config.json") != config:
        raise InputError(f"{work_dir} holds a sweep with other settings; remove it or choose another --work-dir")
    tensors = load_file(work_dir / "statistics.safetensors")
    for k, gathered in enumerate(statistics):
        gathered.totals = {name: tensors[f"{k}.{name}"] for name in gathered.totals}
    return int(tensors["done"]), statistics


def store(work_dir: Path, done: int, statistics: list[FeatureStatistics]) -> None:
    """Write the statistics of all schedules at once."""
    tensors = {f"{k}.{name}": np.asarray(value) for k, gathered in enumerate(statistics) for name, value in gathered.totals.items()}
    with atomic_path(work_dir / "statistics.safetensors") as temporary:
        save_file(tensors | {"done": np.array(done)}, temporary)


def main(argv: list[str] | None = None) -> None:
    """Walk all schedules over all images, then write the table."""
    args = parse_args(argv)
    plan = sampling_plan(args)
    if len(plan.labels) < 2:
        raise InputError("FD-emoji needs at least 2 images; pass a larger --num-images")
    check_folder(args.out.parent)
    ratios = [StitchSchedule(schedule.fractions, order=(0, 2)) for schedule in two_way_ratios()]  # denoisers 0 and 2 of small, base, large
    schedules = ratios + [StitchSchedule(shares) for shares in THREE_MODEL_MIXES]
    denoisers = load_denoisers(plan, plan.preset.denoisers)
    autoencoder = Autoencoder(plan.vae, plan.device)
    extractor = create_extractor("emoji", plan.device, args.models)
    reference = extractor.references()
    config = {
        "settings": plan.settings,
        "weights": {file.letter: file_hash(file.path) for file in plan.preset.denoisers}
        | {"vae": file_hash(autoencoder.weights), "features": file_hash(args.models / "features.safetensors")},
        "labels": plan.labels.tolist(),
        "seed": args.seed,
        "dtype": args.dtype,
        "chunk": args.chunk,
        "schedules": [schedule.to_json() for schedule in schedules],
    }
    done, statistics = restore(args.work_dir, config, schedules)

    with tqdm(total=len(plan.labels), initial=done, desc=f"{len(schedules)} schedules", unit="image") as bar:
        while done < len(plan.labels):
            stop = min(done + args.chunk, len(plan.labels))
            for gathered, latents in zip(statistics, walk(plan, denoisers, schedules, done, stop), strict=True):
                gather(extractor, autoencoder.decode(latents), into=gathered)
            bar.update(stop - done)
            done = stop
            store(args.work_dir, done, statistics)

    rows = make_rows(plan, schedules, statistics, reference, measure(plan, denoisers))
    write_json(
        args.out,
        {key: config[key] for key in ("settings", "weights", "seed", "dtype")}
        | {
            "num_images": len(plan.labels),
            "metric": "FD-emoji: Frechet distance in the features of the bundled extractor; comparable only with itself",
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "device": str(plan.device),
            "rows": rows,
        },
    )
    show(args.out.with_suffix(".png"), rows, len(ratios))


def measure(plan: SamplingPlan, denoisers: list[DiT]) -> list[float]:
    """Seconds of a step of each denoiser, for 8 images."""
    noise = SampleNoise(range(8))
    x, y = noise.latents(denoisers[0].latent_shape, plan.device), torch.arange(8, device=plan.device) % plan.num_classes
    return measure_step_seconds(denoisers, x, y, solver=plan.solver, guidance=plan.guidance, noise=noise, repeats=15)


def make_rows(
    plan: SamplingPlan,
    schedules: list[StitchSchedule],
    statistics: list[FeatureStatistics],
    reference: dict[str, tuple[np.ndarray, np.ndarray]],
    step_seconds: list[float],
) -> list[dict[str, Any]]:
    """One row for each schedule; the first one is the large model alone, which the others are compared with."""
    letters = [file.letter for file in plan.preset.denoisers]
    seconds = [predict_seconds(schedule, plan.solver, step_seconds) for schedule in schedules]
    quality = [{name: frechet_distance(gathered.mean, gathered.covariance, *reference[name]) for name in reference} for gathered in statistics]
    return [
        {
            "schedule": schedule.to_json(),
            "name": schedule.describe(letters),
            "sampling_speed_up": seconds[0] / seconds[k],
            "fd_emoji": quality[k]["train"],
            "fd_emoji_held_out": quality[k]["held_out"],
            "fd_relative": quality[k]["train"] / quality[0]["train"] - 1,
        }
        for k, schedule in enumerate(schedules)
    ]


def show(picture: Path, rows: list[dict[str, Any]], num_ratios: int) -> None:
    """Print the table and draw the front."""
    cells = [
        [
            row["name"],
            f"{row['sampling_speed_up']:.2f}",
            f"{row['fd_emoji']:.2f}",
            f"{100 * row['fd_relative']:+.1f} %",
            f"{row['fd_emoji_held_out']:.2f}",
        ]
        for row in rows
    ]
    print(markdown_table(["schedule", "sampling speed-up", "FD-emoji", "against large alone", "FD-emoji, held-out reference"], cells))
    plot_tradeoff(
        picture,
        {
            name: [(1 / row["sampling_speed_up"], row["fd_emoji"], row["name"]) for row in part]
            for name, part in (("small, large", rows[:num_ratios]), ("small, base, large", rows[num_ratios:]))
        },
        xlabel="cost of sampling relative to the large model alone",
        ylabel="FD-emoji (comparable only with itself)",
        lines=["small, large"],
    )


if __name__ == "__main__":
    run(main)
