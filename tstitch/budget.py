"""Which schedule for a budget: what each costs here, how good it was measured to be, and the best of those that a budget allows.

A schedule's seconds are a sum: evaluations of each denoiser times the seconds of one, measured on this machine, plus decoding. Its quality is looked up
where it was measured with these weights and settings; where it was not, more of the largest model counts as better, and that is said.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tstitch.autoencoder import Autoencoder
from tstitch.cli import OUTPUT, Load, SamplingPlan, help_group
from tstitch.errors import InputError
from tstitch.files import check_file, write_json
from tstitch.presets import DenoiserFile
from tstitch.results import markdown_table, quality_by_schedule, run_record
from tstitch.schedule import StitchSchedule
from tstitch.tradeoff import evaluation_seconds
from tstitch.tune import measure_seconds
from tstitch.walker import total_seconds


@dataclass(frozen=True)
class Option:
    """A schedule and what it is expected to be here.

    Args:
        seconds: a picture, predicted.
        speed_up: against the largest model alone.
        largest: the largest model's share of the evaluations.
        quality: as it was measured, lower is better; None where it was not.
    """

    schedule: str
    name: str
    seconds: float
    speed_up: float
    largest: float
    quality: float | None


def add_budget_args(parser: argparse.ArgumentParser, backbone: str) -> None:
    """Add what is asked of a schedule; `tune` reads it. `backbone` makes the default file."""
    group = parser.add_argument_group("budget")
    group.add_argument("--latency", type=float, metavar="SECONDS", help="the best schedule within so many seconds a picture, --num-images made together")
    group.add_argument("--speed-up", type=float, metavar="X", help="at least X times as fast as the largest model alone: the best such schedule")
    group.add_argument("--max-loss", type=float, metavar="PERCENT", help="at most so much worse than the largest model alone: the fastest such schedule")
    output = help_group(parser, OUTPUT)
    output.add_argument("--out", type=Path, default=Path(f"results/tune_{backbone}.json"), help="file to write: every schedule and the chosen one")
    parser.set_defaults(num_images=1)


def check_budget(args: argparse.Namespace) -> None:
    """Refuse a budget that says nothing, before anything is loaded.

    Raises:
        InputError: naming the flags.
    """
    if all(value is None for value in (args.latency, args.speed_up, args.max_loss)):
        raise InputError("say the budget: --latency SECONDS, --speed-up X or --max-loss PERCENT, or several of them")
    for flag, value, least in (("--latency", args.latency, 0), ("--speed-up", args.speed_up, 0), ("--max-loss", args.max_loss, -100)):
        if value is not None and not least < value < math.inf:
            raise InputError(f"{flag} must be a number above {least}, got {value}")
    check_file(args.out)


def front(options: Sequence[Option]) -> list[Option]:
    """Those that no other option beats in both seconds and quality, fastest first; options of unknown quality are all on it."""
    by_seconds = sorted(options, key=lambda option: option.seconds)
    kept, best = [], math.inf
    for option in by_seconds:
        if option.quality is None:
            return by_seconds
        if option.quality < best:
            kept.append(option)
            best = option.quality
    return kept


def choose(options: Sequence[Option], *, latency: float | None = None, speed_up: float | None = None, max_loss: float | None = None) -> Option:
    """The option that a budget asks for.

    Args:
        options: the first is the largest model alone.
        latency: most seconds a picture.
        speed_up: least speed against the first option.
        max_loss: most that the quality may be worse than the first option's, a fraction. With it the fastest option is chosen, without it the best.

    Raises:
        InputError: if no option fits, or the quality is to be judged and was not measured.
    """
    measured = [(option.quality, option) for option in options if option.quality is not None]
    if max_loss is not None and len(measured) < len(options):
        raise InputError("no quality was measured with these weights and settings, so a loss cannot be judged; pass --latency or --speed-up")
    fast = [o for o in options if (latency is None or o.seconds <= latency) and (speed_up is None or o.speed_up >= speed_up)]
    if not fast:
        fastest = min(options, key=lambda option: option.seconds)
        raise InputError(
            f"no schedule is fast enough: the fastest, {fastest.name}, takes {fastest.seconds:.3g} s a picture here, "
            f"{fastest.speed_up:.2f} times as fast as the largest model; ask for no more"
        )
    judged = [(quality, option) for quality, option in measured if option in fast]
    if max_loss is not None:
        alone, _ = measured[0]
        good = [option for quality, option in judged if quality <= (1 + max_loss) * alone]
        if not good:
            quality, best = min(judged, key=lambda pair: pair[0])
            loss = 100 * (quality / alone - 1)
            raise InputError(f"of the schedules that are fast enough the best, {best.name}, is {loss:+.1f} % from the largest model; allow as much")
        return min(good, key=lambda option: option.seconds)
    if len(judged) < len(fast):
        return max(fast, key=lambda option: (option.largest, option.seconds))
    return min(judged, key=lambda pair: (pair[0], pair[1].seconds))[1]


def measure_options(plan: SamplingPlan, files: Sequence[DenoiserFile], schedules: Sequence[StitchSchedule], load: Load) -> tuple[list[Option], Path | None]:
    """Every schedule with its seconds and quality, and where the quality comes from; the first schedule is the largest model alone.

    Raises:
        InputError: if a method chooses its own steps, so that nobody knows its cost beforehand.
    """
    evaluations = [counts for schedule in schedules if (counts := plan.walker.work([schedule], len(files))) is not None]
    if len(evaluations) < len(schedules):
        raise InputError("this method chooses its own steps, so that its cost is not known beforehand; choose one with fixed steps: --sampling-method heun2")
    denoisers, autoencoder = load(plan, files), Autoencoder(plan.vae, plan.device)
    x, y = plan.noise.latents(denoisers[0].latent_shape, plan.device), plan.labels.to(plan.device)
    each = evaluation_seconds(plan, denoisers, x, y)
    (decode,) = measure_seconds([lambda: autoencoder.decode(x)], plan.device)
    source, quality = quality_by_schedule(plan.preset.results, plan.settings, run_record(plan, files)["weights"])
    seconds = [(total_seconds(counts, each) + decode) / len(y) for counts in evaluations]
    names = [schedule.describe([file.letter for file in files]) for schedule in schedules]
    known = quality if names[0] in quality else {}  # without the largest model's own, nothing can be said of a loss
    options = [
        Option(schedule.to_json(), name, spent, seconds[0] / spent, counts[-1] / sum(counts), known.get(name))
        for schedule, name, spent, counts in zip(schedules, names, seconds, evaluations, strict=True)
        if not known or name in known  # what was measured is not compared with what was not
    ]
    return options, source if known else None


@torch.no_grad()
def tune(args: argparse.Namespace, plan: SamplingPlan, files: Sequence[DenoiserFile], schedules: Sequence[StitchSchedule], load: Load) -> None:
    """Measure, choose, print the front, write --out.

    Args:
        args: what `add_budget_args` asked for.
        schedules: those to choose from; the first is the largest model alone.
        load: called as load(plan, files), gives the denoisers.
    """
    options, source = measure_options(plan, files, schedules, load)
    loss = None if args.max_loss is None else args.max_loss / 100
    chosen = choose(options, latency=args.latency, speed_up=args.speed_up, max_loss=loss)
    cells = [
        ["*" if o == chosen else "", o.name, f"{o.seconds:.4f}", f"{o.speed_up:.2f}", "-" if o.quality is None else f"{o.quality:.2f}"] for o in front(options)
    ]
    print(markdown_table(["chosen", "schedule", "seconds per image", "speed-up", "FD-emoji"], cells))
    if source is None:
        print("no quality was measured with these weights and settings; of two schedules the one with more of the largest model is taken as better")
    write_json(
        args.out,
        run_record(plan, files) | {"chosen": asdict(chosen), "options": [asdict(option) for option in options], "quality_from": source and source.name},
    )
    alone = options[0]
    quality = "" if source is None else f" at FD-emoji {alone.quality:.2f}"
    print(f"above: the front of {len(options)} schedules; {alone.name} takes {alone.seconds:.4f} s{quality}")
    print(f"chosen: {chosen.name}, {chosen.speed_up:.2f} times as fast; every schedule is in {args.out}")
