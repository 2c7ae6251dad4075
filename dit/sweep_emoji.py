"""Measure FD-emoji of stitched schedules: the 11 ratios of small and large, and three-model mixes.

    python dit/sweep_emoji.py --num-images 2000 --dtype bf16 --out pretrained_models/emoji/dit_results.json
    torchrun --nproc-per-node 2 dit/sweep_emoji.py --num-images 2000 --dtype bf16

Every schedule sees the same noise and the same labels (image i has seed + i and label i modulo 9). All schedules are walked as one tree, a chunk of
images at a time; a killed run goes on to the same numbers. FD-emoji is comparable only with itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import load_denoisers
from tstitch.cli import add_sampling_args, new_parser, run, sampling_plan
from tstitch.emoji_sweep import add_sweep_args, show, sweep
from tstitch.generate import join_ranks
from tstitch.schedule import StitchSchedule, two_way_ratios

# Denoisers 0 and 2 of small, base, large.
RATIOS = [StitchSchedule(schedule.fractions, order=(0, 2)) for schedule in two_way_ratios()]
# Shares of small, base and large in fifths: every mix in which all three take part.
THREE_MODEL_MIXES = [StitchSchedule((a / 5, b / 5, (5 - a - b) / 5)) for a in range(1, 4) for b in range(1, 5 - a)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_sweep_args(parser, "dit-emoji-sweep")
    add_sampling_args(parser)
    parser.set_defaults(preset="emoji", num_images=2000, class_labels=list(range(9)))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Walk all schedules over all images, then write the table and draw the front."""
    args = parse_args(argv)
    with join_ranks() as ranks:
        with ranks.agree():
            plan = sampling_plan(args)
        rows = sweep(args, ranks, plan, plan.preset.denoisers, [*RATIOS, *THREE_MODEL_MIXES], load_denoisers)
    show(args.out, {"small, large": rows[: len(RATIOS)], "small, base, large": rows[len(RATIOS) :]})


if __name__ == "__main__":
    run(main)
