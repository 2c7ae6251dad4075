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

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import load_denoisers
from tstitch.autoencoder import Autoencoder
from tstitch.cli import SamplingPlan, add_sampling_args, new_parser, run, sampling_plan
from tstitch.errors import InputError
from tstitch.files import atomic_path, read_json, write_json
from tstitch.metrics import FeatureStatistics
from tstitch.metrics.emoji import EmojiFeatures, fd_emoji, gather, load_extractor, load_reference
from tstitch.noise import SampleNoise
from tstitch.plots import plot_tradeoff
from tstitch.presets import ROOT
from tstitch.results import markdown_table
from tstitch.schedule import StitchSchedule, two_way_ratios
from tstitch.sweep import sample_many
from tstitch.tune import measure_step_seconds, predict_seconds

# Shares of small, base and large in fifths: every mix in which all three take part.
THREE_MODEL_MIXES = tuple((a / 5, b / 5, (5 - a - b) / 5) for a in range(1, 4) for b in range(1, 5 - a))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/dit_emoji_sweep.json"), help="results file to write")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/dit-emoji-sweep"), help="where statistics wait for a resume")
    parser.add_argument("--chunk", type=int, default=50, help="images walked together")
    parser.add_argument("--max-batch", type=int, default=64, help="most images in one denoiser call")
    parser.add_argument("--models", type=Path, default=ROOT / "pretrained_models" / "emoji", help="folder of the extractor and its reference")
    add_sampling_args(parser)
    parser.set_defaults(preset="emoji", num_images=2000, class_labels=list(range(9)))
    return parser.parse_args(argv)


def two_model(schedule: StitchSchedule) -> StitchSchedule:
    """A small-large schedule on the list small, base, large."""
    return StitchSchedule(schedule.fractions, order=(0, 2))


def restore(work_dir: Path, config: dict, schedules: list[StitchSchedule]) -> tuple[int, list[FeatureStatistics]]:
    """Images done and statistics so far."""
    statistics = [FeatureStatistics(EmojiFeatures.dim) for _ in schedules]
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
    schedules = [*map(two_model, two_way_ratios()), *map(StitchSchedule, THREE_MODEL_MIXES)]
    denoisers = load_denoisers(plan, plan.preset.denoisers)
    autoencoder = Autoencoder(plan.vae, plan.device)
    extractor, reference = load_extractor(args.models, plan.device), load_reference(args.models)
    config = {
        "settings": plan.settings, "num_images": len(plan.labels), "seed": args.seed, "dtype": args.dtype, "chunk": args.chunk,
        "schedules": [s.to_json() for s in schedules],
    }  # fmt: skip
    done, statistics = restore(args.work_dir, config, schedules)

    def walk(start: int, stop: int) -> list[Tensor]:
        noise = SampleNoise(plan.noise.seeds[start:stop])
        return sample_many(
            denoisers, noise.latents(denoisers[0].latent_shape, plan.device), plan.labels[start:stop].to(plan.device), schedules=schedules,
            solver=plan.solver, guidance=plan.guidance, noise=noise, max_batch=args.max_batch,
        )  # fmt: skip

    with tqdm(total=len(plan.labels), initial=done, desc=f"{len(schedules)} schedules", unit="image") as bar:
        while done < len(plan.labels):
            stop = min(done + args.chunk, len(plan.labels))
            for gathered, latents in zip(statistics, walk(done, stop), strict=True):
                gather(extractor, autoencoder.decode(latents), into=gathered)
            bar.update(stop - done)
            done = stop
            store(args.work_dir, done, statistics)

    quality = [{name: fd_emoji(gathered, reference[name]) for name in reference} for gathered in statistics]
    write_table(args.out, plan, config, schedules, quality, measure(plan, denoisers))


def measure(plan: SamplingPlan, denoisers: list) -> list[float]:
    """Seconds of a step of each denoiser, for 8 images."""
    noise = SampleNoise(range(8))
    x, y = noise.latents(denoisers[0].latent_shape, plan.device), plan.labels[:8].to(plan.device)
    return measure_step_seconds(denoisers, x, y, solver=plan.solver, guidance=plan.guidance, repeats=15)


def write_table(
    path: Path, plan: SamplingPlan, config: dict, schedules: list[StitchSchedule], quality: list[dict[str, float]], step_seconds: list[float]
) -> None:
    """Write the results file and its picture, and print the table."""
    letters = [file.letter for file in plan.preset.denoisers]
    large = plan.solver.num_steps * step_seconds[-1]
    rows = []
    for schedule, fd in zip(schedules, quality, strict=True):
        short = StitchSchedule(schedule.fractions) if schedule.order == (0, 2) else schedule  # as the two-model script writes it
        rows.append({
            "schedule": short.to_json(), "name": schedule.describe(letters), "speed_up": large / predict_seconds(schedule, plan.solver, step_seconds),
            "fd_emoji": fd["train"], "fd_emoji_held_out": fd["held_out"], "fd_relative": fd["train"] / quality[0]["train"] - 1,
        })  # fmt: skip
    write_json(path, {
        "settings": plan.settings, "num_images": config["num_images"], "seed": config["seed"], "dtype": config["dtype"],
        "metric": "FD-emoji: Frechet distance in the features of pretrained_models/emoji/features.safetensors; comparable only with itself",
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "device": str(plan.device), "step_seconds_of_8_images": step_seconds, "rows": rows,
    })  # fmt: skip
    table = [[r["name"], f"{r['speed_up']:.2f}", f"{r['fd_emoji']:.2f}", f"{100 * r['fd_relative']:+.1f} %", f"{r['fd_emoji_held_out']:.2f}"] for r in rows]
    curves = {"small, large": rows[:11], "small, base, large": rows[11:]}
    plot_tradeoff(
        path.with_suffix(".png"),
        {name: [(1 / r["speed_up"], r["fd_emoji"], r["name"]) for r in part] for name, part in curves.items()},
        xlabel="cost relative to the large model alone",
        ylabel="FD-emoji (comparable only with itself)",
        lines=["small, large"],
    )
    print(markdown_table(["schedule", "speed-up", "FD-emoji", "against large alone", "FD-emoji, held-out reference"], table))


if __name__ == "__main__":
    run(main)
