"""Draw the curves of training runs side by side: loss, and the distance that --eval-every measured.

    python dit/plot_runs.py runs/posenc-abs runs/posenc-rope runs/posenc-gta --out figures/posenc.png

Reads log.jsonl of each run folder and prints its last values.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tstitch.cli import OUTPUT, help_group, new_parser, run
from tstitch.errors import InputError
from tstitch.files import check_folder
from tstitch.plots import plot_curves
from tstitch.results import markdown_table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders of a trainer")
    output = help_group(parser, OUTPUT)
    output.add_argument("--quantities", nargs="+", default=["loss", "fd_emoji"], metavar="NAME", help="columns of the logs, one panel each")
    output.add_argument("--out", type=Path, default=Path("figures/runs.png"), help="picture to write")
    return parser.parse_args(argv)


def read_log(run_folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's log."""
    path = run_folder / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is missing or damaged ({error}); pass run folders of a trainer") from None


def run_names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart, a/dit and b/dit; the name alone where no other folder has it.

    Raises:
        InputError: if a folder is named twice.
    """
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]  # noqa: PTH100  (of a link its own name, not its target's)
    twice = sorted({str(folder) for folder, path in zip(folders, parts, strict=True) if parts.count(path) > 1})
    if twice:
        raise InputError(f"{', '.join(twice)}: the same run twice; pass each run once")
    names = []
    for path in parts:
        length = next(k for k in range(1, len(path) + 1) if sum(other[-k:] == path[-k:] for other in parts) == 1)
        names.append(Path(*path[-length:]).as_posix())
    return names


def main(argv: list[str] | None = None) -> None:
    """Read, draw, print."""
    args = parse_args(argv)
    check_folder(args.out.parent)
    logs = {name: read_log(folder) for name, folder in zip(run_names(args.runs), args.runs, strict=True)}
    panels = {
        quantity: {name: [(row["step"], row[quantity]) for row in rows if quantity in row] for name, rows in logs.items()} for quantity in args.quantities
    }
    empty = [f"{quantity} of {name}" for quantity, curves in panels.items() for name, points in curves.items() if not points]
    if empty:
        raise InputError(f"the logs hold no {', '.join(empty)}; choose other --quantities")
    plot_curves(args.out, panels, xlabel="training step")
    steps = {name: str(rows[-1]["step"]) for name, rows in logs.items()}
    print(markdown_table(["run", "steps", *panels], [[name, steps[name], *(f"{curves[name][-1][1]:.4g}" for curves in panels.values())] for name in logs]))


if __name__ == "__main__":
    run(main)
