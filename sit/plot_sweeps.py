"""Tables and pictures of several sweeps of `sit/sweep_emoji.py`: FD-emoji against seconds and against evaluations.

    python sit/plot_sweeps.py pretrained_models/emoji/sit_results_*.json --out pretrained_models/emoji/sit_results.png
    python sit/plot_sweeps.py benchmarks/results/sit_*.json --x evaluations --out assets/figures/sit_evaluations.png

Sweeps of different numbers of pictures are refused: their distances are not comparable.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tstitch.cli import OUTPUT, help_group, new_parser, run
from tstitch.emoji_sweep import sweep_table
from tstitch.errors import InputError
from tstitch.files import check_file, read_json
from tstitch.plots import plot_tradeoff

AXES = {"seconds": "seconds per picture on the machine of the sweep, without decoding", "evaluations": "evaluations per picture, of both models together"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("sweeps", type=Path, nargs="+", metavar="FILE", help="results of sweep_emoji.py")
    output = help_group(parser, OUTPUT)
    output.add_argument("--x", choices=AXES, default="seconds", help="seconds: a curve for each sweep; evaluations: a curve for each ratio and equation")
    output.add_argument("--out", type=Path, required=True, help="picture to write")
    return parser.parse_args(argv)


def name_of(result: dict[str, Any]) -> str:
    """Equation, method, evaluations of the large model alone, and models of a sweep."""
    return f"{result['settings']['solver']}, {sum(result['rows'][0]['evaluations']):.3g} evaluations: {' + '.join(result['models'].values())}"


def point(row: dict[str, Any], x: str, label: str) -> tuple[float, float, str]:
    """Cost, quality and label of a row."""
    return (row["seconds_per_image"] if x == "seconds" else sum(row["evaluations"])), row["fd_emoji"], label


def main(argv: list[str] | None = None) -> None:
    """Print the tables, draw the picture."""
    args = parse_args(argv)
    results = [read_json(path) for path in args.sweeps]
    if len({result["num_images"] for result in results}) > 1:
        raise InputError(f"these sweeps have {sorted({result['num_images'] for result in results})} pictures; pass sweeps of one number")
    check_file(args.out)
    common = set.intersection(*({row["name"] for row in result["rows"]} for result in results))
    curves: dict[str, list[tuple[float, float, str]]] = {}
    for path, result in sorted(zip(args.sweeps, results, strict=True), key=lambda pair: sum(pair[1]["rows"][0]["evaluations"])):
        print(f"{path.stem}: {name_of(result)}, {result['num_images']} pictures\n\n{sweep_table(result['rows'])}\n")
        for row in result["rows"]:
            if args.x == "seconds":
                ends_and_middle = row in (result["rows"][0], result["rows"][len(result["rows"]) // 2], result["rows"][-1])  # all of them would overlap
                curves.setdefault(name_of(result), []).append(point(row, args.x, row["name"] if ends_and_middle else ""))
            elif row["name"] in common:  # the few that make curves across sweeps
                kind = result["settings"]["solver"]
                curves.setdefault(f"{kind}, {row['name']}", []).append(point(row, args.x, ""))
    plot_tradeoff(args.out, curves, xlabel=AXES[args.x], ylabel="FD-emoji (comparable only with itself)")


if __name__ == "__main__":
    run(main)
