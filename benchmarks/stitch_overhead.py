"""Does a stitched run cost what its parts cost? Time at ratio r against r * T_small + (1 - r) * T_large.

    python benchmarks/stitch_overhead.py                    # the bundled emoji models

A ratio is compared with the two models alone in its own round: `speed / ideal` is 1 where stitching costs nothing. Sampling only, without decoding.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import Record, add_bench_args
from dit.checkpoints import load_denoisers
from tstitch.cli import add_sampling_args, new_parser, run, sampling_plan
from tstitch.sampling import sample
from tstitch.schedule import StitchSchedule


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.5, 0.6, 0.8], help="shares of the small model, each 0..1")
    add_sampling_args(parser)
    add_bench_args(parser, rounds=7)
    parser.set_defaults(preset="emoji")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Time, compare, print."""
    args = parse_args(argv)
    ratios = [1.0, *args.ratios, 0.0]
    schedules = {f"ratio {ratio:g}": StitchSchedule.from_ratio(ratio) for ratio in ratios}
    plan = sampling_plan(args)
    record = Record("stitch_overhead", args)
    denoisers = load_denoisers(plan, [plan.preset.denoisers[0], plan.preset.denoisers[-1]])
    x_T, y = plan.noise.latents(denoisers[0].latent_shape, plan.device), plan.labels.to(plan.device)
    walk = partial(sample, denoisers, x_T, y, solver=plan.solver, guidance=plan.guidance, noise=plan.noise)
    comparison = record.compare({name: partial(walk, schedule=schedule) for name, schedule in schedules.items()})

    small, large = comparison.seconds["ratio 1"], comparison.seconds["ratio 0"]
    for name, schedule in schedules.items():
        legs = schedule.legs(plan.solver.num_steps)
        share = sum(leg.stop - leg.start for leg in legs if leg.denoiser == 0) / plan.solver.num_steps
        comparison.reckoned[f"ideal, {name}"] = [share * s + (1 - share) * t for s, t in zip(small, large, strict=True)]
    record.add(
        f"{plan.preset.name}, {len(y)} images, {plan.solver.num_steps} steps, {args.dtype}",
        comparison,
        against={name: {"ideal": f"ideal, {name}", "large": "ratio 0"} for name in schedules},
        settings=plan.settings,
    )
    record.show()


if __name__ == "__main__":
    run(main)
