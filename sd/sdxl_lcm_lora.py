"""SDXL in 2, 4 and 8 steps: latent consistency LoRAs in the small and the large model; pictures of every ratio from the same noise.

    python sd/sdxl_lcm_lora.py --prompt "a lighthouse in a storm, oil painting"              # ratios k/2, k/4, k/8: each number of steps for the small model
    python sd/sdxl_lcm_lora.py --steps 4 --ratios 0 0.5 1

For N steps, figures/sdxl_lcm_lora/steps_N gets grid.png (rows prompts, columns ratios), every picture and results.json.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd.demo import demo_parser, demo_plan, load_pipeline, run_demo
from sd.tstitch_sd_utils import LARGE_LCM_LORA, LARGE_SDXL, SMALL_LCM_LORA, get_tstitch_pipepline_sdxl_lcm_lora
from tstitch.cli import MODELS, help_group, run

PROMPT = "a lighthouse in a storm, oil painting"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = demo_parser(__doc__, prompt=PROMPT, large=LARGE_SDXL, steps=(2, 4, 8), guidance=1.0, ratios=None, save_dir="figures/sdxl_lcm_lora")
    for size, lora in (("large", LARGE_LCM_LORA), ("small", SMALL_LCM_LORA)):
        help_group(parser, MODELS).add_argument(
            f"--{size}_lcm_lora", default=lora, metavar="NAME", help=f"the {size} model's LCM-LoRA: a file, a folder or a hub name"
        )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, sample, save, for each number of steps."""
    args = parse_args(argv)
    plan = demo_plan(args)
    pipe = load_pipeline(get_tstitch_pipepline_sdxl_lcm_lora, plan, large_lora=args.large_lcm_lora, small_lora=args.small_lcm_lora)
    for steps in plan.counts:
        ratios = args.ratios or [k / steps for k in range(steps + 1)]
        run_demo(pipe, replace(plan, steps=steps, ratios=ratios, folder=plan.folder / f"steps_{steps}"))


if __name__ == "__main__":
    run(main)
