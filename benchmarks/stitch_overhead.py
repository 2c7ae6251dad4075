"""Does a stitched run cost what its parts cost? Time at ratio r against r * T_small + (1 - r) * T_large.

    python benchmarks/stitch_overhead.py                    # the bundled emoji models
    python benchmarks/stitch_overhead.py --rounds 9 --json benchmarks/results/stitch_overhead_cpu.json

Each round runs the small model alone, every ratio and the large model alone, in turn, in this one process; a ratio is compared with the two single runs
of its own round, so a machine whose speed drifts slows all alike. Shown is the median over the rounds. Sampling only, without decoding.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import load_denoisers
from tstitch.cli import add_sampling_args, new_parser, positive_int, run, sampling_plan
from tstitch.files import write_json
from tstitch.results import markdown_table
from tstitch.sampling import sample
from tstitch.schedule import StitchSchedule
from tstitch.tune import wait_for


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.5, 0.6, 0.8], help="shares of the small model, each 0..1")
    parser.add_argument("--rounds", type=positive_int, default=7, help="rounds after one that warms up")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    add_sampling_args(parser)
    parser.set_defaults(preset="emoji")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Time, compare, print."""
    args = parse_args(argv)
    ratios = [1.0, *args.ratios, 0.0]
    schedules = [StitchSchedule.from_ratio(ratio) for ratio in ratios]
    plan = sampling_plan(args)
    denoisers = load_denoisers(plan, [plan.preset.denoisers[0], plan.preset.denoisers[2]])
    x_T, y = plan.noise.latents(denoisers[0].latent_shape, plan.device), plan.labels.to(plan.device)

    rounds: list[list[float]] = []
    for _ in tqdm(range(args.rounds + 1), desc="rounds", unit="round"):
        seconds = []
        for schedule in schedules:
            wait_for(plan.device)
            start = time.perf_counter()
            sample(denoisers, x_T, y, schedule=schedule, solver=plan.solver, guidance=plan.guidance, noise=plan.noise)
            wait_for(plan.device)
            seconds.append(time.perf_counter() - start)
        rounds.append(seconds)
    rounds = rounds[1:]

    rows = []
    for k, schedule in enumerate(schedules):
        small_steps = sum(leg.stop - leg.start for leg in schedule.legs(plan.solver.num_steps) if leg.denoiser == 0)
        share = small_steps / plan.solver.num_steps
        relative = [s[k] / (share * s[0] + (1 - share) * s[-1]) for s in rounds]
        rows.append({"ratio": ratios[k], "seconds": statistics.median(s[k] for s in rounds), "to_ideal": statistics.median(relative), "of_rounds": relative})
    print(markdown_table(["ratio", "seconds", "time / ideal"], [[f"{r['ratio']:g}", f"{r['seconds']:.3f}", f"{r['to_ideal']:.3f}"] for r in rows]))
    print(f"{len(plan.labels)} images, {plan.solver.num_steps} steps; T_large / T_small = {rows[-1]['seconds'] / rows[0]['seconds']:.2f}")
    if args.json:
        write_json(args.json, {
            "settings": plan.settings, "images": len(plan.labels), "dtype": args.dtype, "device": str(plan.device), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "rounds": args.rounds, "rows": rows,
        })  # fmt: skip


if __name__ == "__main__":
    run(main)
