"""SDXL: a small model takes the first steps, a large one the rest; pictures of every ratio from the same noise.

    python sd/sdxl_demo.py --prompt "concept art of a dragon over a town, painterly" --ratios 0 0.3 0.5 1
    python sd/sdxl_demo.py --large FOLDER --small FOLDER --offload switch                    # one U-Net on the accelerator at a time

Writes grid.png (rows prompts, columns ratios), every picture and results.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd.demo import demo_parser, demo_plan, load_pipeline, run_demo
from sd.tstitch_sd_utils import LARGE_SDXL, get_tstitch_pipepline_sdxl
from tstitch.cli import run

PROMPT = "concept art of a dragon over a town, clouds, painterly, highly detailed"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    return demo_parser(__doc__, prompt=PROMPT, negative_prompt="photograph, ugly", large=LARGE_SDXL, save_dir="figures/sdxl").parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, sample, save."""
    plan = demo_plan(parse_args(argv))
    run_demo(load_pipeline(get_tstitch_pipepline_sdxl, plan), plan)


if __name__ == "__main__":
    run(main)
