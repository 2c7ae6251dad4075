"""Measure the bundled text-to-image pair: FD-emoji and how well pictures follow their captions, by ratio, alone and together with DeepCache.

    python sd/sweep_emoji.py --ratios 0 0.2 0.4 0.6 0.8 1 --out results/sd_emoji.json
    python sd/sweep_emoji.py --ratios 0 0.4 --cache-intervals 1 3 --out results/sd_cached.json     # needs the package DeepCache

Picture i is made from seed + i: its noise, and its caption, that of a drawing of category i modulo 9. "Category right" and "style right" are the shares
of pictures in which the bundled feature network sees the category and the drawing set of their caption: prompt alignment, as far as a network of nine
classes can tell. Speed-ups are of whole calls of the pipeline, text encoder and decoder included. DeepCache (Ma et al. 2024, arXiv:2312.00858) keeps deep
features of the large U-Net for N - 1 of N steps; it is flushed where the large U-Net takes over. A sweep that was killed goes on with the row that it was at.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from sd.demo import LETTERS, check_steps, measure_calls, model_lines, pipeline_bytes, planned_legs, sample
from sd.emoji_text import Caption, join_caption, read_captions
from sd.sdxl_data import weights_hash
from sd.tstitch_sd_utils import get_tstitch_pipepline, stitched_unet
from tstitch.cli import add_dry_run_arg, new_parser, parse_device, positive_int, run
from tstitch.data import open_features
from tstitch.dry_run import MEASURED_ON_CPU, Files, Work, count_flops, show_memory, show_plan
from tstitch.emoji_sweep import METRIC
from tstitch.errors import InputError
from tstitch.files import check_file, read_json, write_json
from tstitch.metrics import FeatureStatistics, frechet_distance
from tstitch.metrics.emoji import EmojiExtractor
from tstitch.metrics.extractors import create_extractor
from tstitch.results import markdown_table
from tstitch.schedule import StitchSchedule
from tstitch.tune import measure_seconds

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MEASURED_PICTURES, MEASURED_REPEATS = 8, 5
STYLES = ("google", "twitter")  # the drawing sets of the feature network, in its order


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    sweep = parser.add_argument_group("what is compared")
    sweep.add_argument("--ratios", type=float, nargs="+", metavar="R", default=[0, 0.2, 0.4, 0.6, 0.8, 1], help="the small model's shares, 0..1, 0 first")
    sweep.add_argument(
        "--cache-intervals", type=positive_int, nargs="+", metavar="N", default=[1], help="steps from one full step to the next, 1 (no cache) first"
    )
    pictures = parser.add_argument_group("sampling")
    pictures.add_argument("--num-images", type=positive_int, default=500, metavar="N", help="pictures of each row, at least 2")
    pictures.add_argument("--num-sampling-steps", type=positive_int, default=20, metavar="N", help="solver steps, 1..1000")
    pictures.add_argument("--cfg-scale", type=float, default=3.0, help="uncond + scale * (cond - uncond); 1 turns guidance off")
    pictures.add_argument("--seed", type=int, default=0, help="picture i and its caption are made from seed + i alone; not negative")
    pictures.add_argument("--max-batch", type=positive_int, default=50, metavar="N", help="pictures of one call of the pipeline")
    pictures.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    files = parser.add_argument_group("files")
    files.add_argument("--features-path", type=Path, default=Path("data/emoji/features"), help="features with captions.jsonl, which the captions come from")
    files.add_argument("--out", type=Path, default=Path("results/sd-emoji-sweep.json"), help="results file to write")
    add_dry_run_arg(parser)
    return parser.parse_args(argv)


def choose_captions(args: argparse.Namespace) -> list[Caption]:
    """A caption for each picture; the categories take turns, since every category has the same weight in the reference.

    Raises:
        InputError: if the features or the captions are missing.
    """
    labels = np.asarray(open_features(args.features_path).labels)
    captions = read_captions(args.features_path / "captions.jsonl", len(labels))
    members = [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]
    if not all(len(items) for items in members):
        raise InputError(f"{args.features_path} has classes without items; extract the features again, from folders that are not empty")
    seeds = range(args.seed, args.seed + args.num_images)
    chosen = [np.random.default_rng(seed).choice(members[seed % len(members)]) for seed in seeds]
    return [captions[k] | {"label": int(labels[k])} for k in chosen]


@contextmanager
def deep_cache(pipe: DiffusionPipeline, interval: int) -> Iterator[None]:
    """Let the large U-Net reuse its deep features inside the block, `interval` - 1 of `interval` steps; a block is one call of the pipeline.

    Raises:
        InputError: if the package is not installed.
    """
    if interval == 1:
        yield
        return
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError:
        raise InputError("--cache-intervals above 1 needs the package DeepCache; pip install DeepCache==0.1.1") from None
    # It counts steps from the first one that the large U-Net takes, and keeps nothing beyond the block.
    helper = DeepCacheSDHelper(SimpleNamespace(unet=stitched_unet(pipe).large, scheduler=pipe.scheduler))
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


def draw(pipe: DiffusionPipeline, args: argparse.Namespace, captions: Sequence[Caption], start: int, stop: int, ratio: float, interval: int) -> torch.Tensor:
    """Pictures start..stop-1, uint8 (N, 3, 64, 64)."""
    texts = [join_caption(caption["names"][0], caption["skin_tone"], caption["style"]) for caption in captions[start:stop]]
    seeds = list(range(args.seed + start, args.seed + stop))
    with deep_cache(pipe, interval):
        return sample(pipe, texts, seeds, ratio=ratio, num_inference_steps=args.num_sampling_steps, guidance_scale=args.cfg_scale)


def measure_row(
    pipe: DiffusionPipeline, args: argparse.Namespace, captions: Sequence[Caption], extractor: EmojiExtractor, ratio: float, interval: int, bar: tqdm
) -> dict[str, Any]:
    """Sample and measure one ratio with one cache interval."""
    gathered, right = FeatureStatistics(EmojiExtractor.dim), np.zeros(2)
    for start in range(0, len(captions), args.max_batch):
        part = captions[start : start + args.max_batch]
        pictures = draw(pipe, args, captions, start, start + len(part), ratio, interval)
        gathered.update(extractor.measure(pictures).pool)
        with torch.no_grad():
            guesses = [logits.argmax(1).tolist() for logits in extractor.network(pictures.to(extractor.device))]
        truth = [caption["label"] for caption in part], [STYLES.index(caption["style"]) for caption in part]
        right += [sum(a == b for a, b in zip(*pair, strict=True)) for pair in zip(guesses, truth, strict=True)]
        bar.update(len(part))
    quality = {name: frechet_distance(gathered.mean, gathered.covariance, *reference) for name, reference in extractor.references().items()}
    return {
        "name": StitchSchedule.from_ratio(ratio).describe(LETTERS) + (f", DeepCache {interval}" if interval > 1 else ""),
        "ratio": ratio,
        "cache_interval": interval,
        "fd_emoji": quality["train"],
        "fd_emoji_held_out": quality["held_out"],
        "category_right": right[0] / len(captions),
        "style_right": right[1] / len(captions),
    }


def plan_sweep(
    pipe: DiffusionPipeline, args: argparse.Namespace, captions: Sequence[Caption], extractor: EmojiExtractor, asked: Sequence[tuple[float, int]],
    finished: Sequence[tuple[float, int]],
) -> None:  # fmt: skip
    """Answer --dry-run: what the rows that are left, and the clock of all, will cost. `asked` and `finished` are pairs of ratio and cache interval."""
    together, device = min(args.max_batch, len(captions), MEASURED_ON_CPU if pipe.device.type == "cpu" else args.max_batch), pipe.device
    short = argparse.Namespace(**vars(args) | {"num_sampling_steps": min(2, args.num_sampling_steps)})

    def prepare() -> list[torch.Tensor]:
        return [draw(pipe, short, captions, 0, together, ratio, 1) for ratio in (0.0, 1.0)]

    def judge() -> None:
        extractor.measure(pictures)
        with torch.no_grad():
            extractor.network(pictures.to(extractor.device))

    pictures, left = prepare()[0], [pair for pair in asked if pair not in finished]
    legs = {ratio: planned_legs(pipe, ratio, args.num_sampling_steps) for ratio in args.ratios}
    timed = min(MEASURED_PICTURES, len(captions)) * (MEASURED_REPEATS + 1)
    calls = [(timed + len(captions) * (pair in left), legs[pair[0]][1]) for pair in asked]
    modules, works = measure_calls(pipe, device, prepare, together, calls)
    (seconds,) = measure_seconds([judge], device, 2)
    works.append(Work("features", len(left) * len(captions), count_flops(judge) / together, seconds / together))
    cached = ", DeepCache counted as if it kept nothing" if max(args.cache_intervals) > 1 else ""
    show_plan(
        [
            *model_lines(modules),
            ("pictures", f"{len(captions)} of each of {len(asked)} rows, of which {len(left)} are left, at most {args.max_batch} at once"),
            ("schedules", ", ".join(f"{ratio:g}: {'/'.join(map(str, steps))}" for ratio, (steps, _) in legs.items()) + " steps small/large"),
        ],
        works,
        how=f"an estimate from {together} pictures at once on {device}, without loading and writing{cached}",
        memory=show_memory(device, pipeline_bytes(pipe), size=f" at {together} of {args.max_batch} pictures a call" if together < args.max_batch else ""),
        files=[Files("results", 1e5, args.out.parent, at_most=True)],
    )


def main(argv: list[str] | None = None) -> None:
    """Measure the rows that are missing, then their speed side by side."""
    args = parse_args(argv)
    if args.ratios[0] != 0 or not all(0 <= ratio <= 1 for ratio in args.ratios):
        raise InputError(f"--ratios are {args.ratios}; begin with 0, the large model alone, which the others are compared with, and stay in 0..1")
    if args.cache_intervals[0] != 1:
        raise InputError(f"--cache-intervals are {args.cache_intervals}; begin with 1, no cache, which the others are compared with")
    if not math.isfinite(args.cfg_scale):
        raise InputError(f"--cfg-scale must be a finite number, got {args.cfg_scale}")
    if args.num_images < 2:
        raise InputError("FD-emoji needs at least 2 images; pass a larger --num-images")
    if args.seed < 0:
        raise InputError(f"--seed must not be negative, got {args.seed}")
    check_file(args.out)
    captions = choose_captions(args)
    pipe = get_tstitch_pipepline("emoji", device=parse_device(args.device))
    check_steps(pipe, [args.num_sampling_steps])
    pipe.set_progress_bar_config(disable=True)
    unet, extractor = stitched_unet(pipe), create_extractor("emoji", pipe.device)
    record: dict[str, Any] = {
        "settings": {"num_steps": args.num_sampling_steps, "cfg_scale": args.cfg_scale, "scheduler": type(pipe.scheduler).__name__},
        "weights": {"S": weights_hash(unet.unets[0]), "L": weights_hash(unet.large), "features": extractor.weights},
        "captions": hashlib.sha256(json.dumps(captions, sort_keys=True).encode()).hexdigest()[:16],
        "seed": args.seed, "num_images": args.num_images, "max_batch": args.max_batch, "device": str(pipe.device), "metric": METRIC,
    }  # fmt: skip
    found = read_json(args.out) if args.out.exists() else record
    differ = [key for key, value in record.items() if found.get(key) != value]
    if differ:
        raise InputError(f"{args.out} holds a sweep with other settings ({', '.join(differ)}); remove it or choose another --out")
    finished = found.get("rows", [])

    rows, asked = [], [(ratio, interval) for interval in args.cache_intervals for ratio in args.ratios if interval == 1 or ratio < 1]
    if args.dry_run:
        plan_sweep(pipe, args, captions, extractor, asked, [(row["ratio"], row["cache_interval"]) for row in finished])
        return
    with tqdm(total=len(asked) * len(captions), desc="sampling", unit="picture") as bar:
        for ratio, interval in asked:
            known = [row for row in finished if (row["ratio"], row["cache_interval"]) == (ratio, interval)]
            bar.update(len(captions) if known else 0)
            rows += known or [measure_row(pipe, args, captions, extractor, ratio, interval, bar)]
            others = [row for row in finished if row not in rows]
            write_json(args.out, record | {"rows": rows + others})

    few = min(MEASURED_PICTURES, len(captions))
    seconds = measure_seconds([partial(draw, pipe, args, captions, 0, few, *pair) for pair in asked], pipe.device, repeats=MEASURED_REPEATS)
    for row, each in zip(rows, seconds, strict=True):
        row |= {"sampling_speed_up": seconds[0] / each, "fd_relative": row["fd_emoji"] / rows[0]["fd_emoji"] - 1}
    write_json(args.out, record | {"rows": rows + others})
    keys = ["sampling_speed_up", "fd_emoji", "fd_relative", "category_right", "style_right"]
    print(markdown_table(["schedule", *keys], [[row["name"], *(f"{row[key]:.3f}" for key in keys)] for row in rows]))


if __name__ == "__main__":
    run(main)
