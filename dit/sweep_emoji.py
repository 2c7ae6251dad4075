"""Measure FD-emoji of stitched schedules: ratios of small and large, three-model mixes, and any others.

    python dit/sweep_emoji.py --num-images 1000 --dtype bf16 --out pretrained_models/emoji/dit_results.json
    torchrun --nproc-per-node 2 dit/sweep_emoji.py --num-images 1000 --dtype bf16
    python dit/sweep_emoji.py --ratios 0 0.4 --no-mixes --schedules '{"fractions": [0.6, 0.4], "order": [2, 0]}' --work-dir runs/large-first

Every schedule sees the same noise and the same labels (image i has seed + i and label i modulo 9). All schedules are walked as one tree, a chunk of
images at a time; a killed run goes on to the same numbers. FD-emoji is comparable only with itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import load_denoisers
from tstitch.cli import STITCHING, YesNo, add_sampling_args, add_weights_args, help_group, new_parser, run, sampling_plan, stitched_files
from tstitch.emoji_sweep import add_ratios_arg, add_sweep_args, choose_ratios, show, sweep
from tstitch.generate import join_ranks
from tstitch.schedule import StitchSchedule, two_way_ratios


def without_base(schedules: Sequence[StitchSchedule]) -> list[StitchSchedule]:
    """Schedules of small and large as such of small, base and large."""
    return [StitchSchedule(schedule.fractions, order=(0, 2)) for schedule in schedules]


RATIOS = without_base(two_way_ratios())
# Shares of small, base and large in fifths: every mix in which all three take part.
THREE_MODEL_MIXES = [StitchSchedule((a / 5, b / 5, (5 - a - b) / 5)) for a in range(1, 4) for b in range(1, 5 - a)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_ratios_arg(parser)
    stitch = help_group(parser, STITCHING)
    stitch.add_argument("--mixes", action=YesNo, default=True, help="the six mixes of fifths in which small, base and large take part")
    stitch.add_argument("--schedules", nargs="+", metavar="JSON", default=[], help="others, as results have them; 0 is small, 1 base, 2 large")
    add_sweep_args(parser, "dit-emoji-sweep")
    add_weights_args(parser)
    add_sampling_args(parser)
    parser.set_defaults(preset="emoji", num_images=1000, class_labels=list(range(9)))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Walk all schedules over all images, then write the table and draw the front."""
    args = parse_args(argv)
    with join_ranks() as ranks:
        with ranks.agree():
            plan = sampling_plan(args)
            files = stitched_files(args, plan, three=True)
            groups = {
                "small, large": without_base(choose_ratios(args)),
                "small, base, large": THREE_MODEL_MIXES if args.mixes else [],
                "others": [StitchSchedule.from_json(text) for text in args.schedules],
            }
            for schedule in groups["others"]:
                schedule.check_denoisers(len(files))
        rows = iter(sweep(args, ranks, plan, files, [schedule for group in groups.values() for schedule in group], load_denoisers))
    show(args.out, {name: list(islice(rows, len(group))) for name, group in groups.items() if group})


if __name__ == "__main__":
    run(main)
