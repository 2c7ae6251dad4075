"""Draw which part of the repository uses which: assets/figures/architecture.svg.

    python assets/draw_architecture.py

The arrows are read from the imports, so the picture cannot say what the code does not do; tests/test_architecture.py holds them to the rule of the README.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from tstitch.cli import OUTPUT, help_group, new_parser, run
from tstitch.files import atomic_path, check_file
from tstitch.presets import ROOT

# Part -> centre, width and what it holds; the lowest row is the core.
PARTS = {
    "tstitch": ((5.0, 0.55), 9.6, "the core: schedule, noise, solvers, sampling, sweep, budget, generate, metrics, training"),
    "dit": ((1.25, 2.3), 2.1, "DiT, fast-DiT, GTA"),
    "sit": ((3.75, 2.3), 2.1, "flows: ODE, SDE"),
    "ldm": ((6.25, 2.3), 2.1, "CompVis U-Nets"),
    "sd": ((8.75, 2.3), 2.1, "SD, SDXL pipelines"),
    "sd/page": ((8.75, 4.05), 2.1, "web page"),
    "benchmarks": ((1.25, 4.05), 2.1, "speed, as ratios"),
    "experiments": ((5.0, 4.05), 2.1, "EXPERIMENTS.md"),
}
TOP = ("sd/page", "benchmarks", "experiments")  # they may use all; who uses several backbones has no arrow to the core


def part_of(file: Path) -> str:
    """The part that a file of the repository belongs to."""
    folders = file.relative_to(ROOT).parts
    page = folders[:2] == ("sd", "page") or file.name == "gradio_demo.py"  # the page's own script
    return "sd/page" if page else folders[0]


def uses(part: str) -> set[str]:
    """The other parts whose modules a part imports, anywhere in its files."""
    folder = ROOT / part
    files = [file for file in (*folder.rglob("*.py"), ROOT / "sd" / "gradio_demo.py") if part_of(file) == part]
    names: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) and node.module and not node.level else set()
    found = {"sd/page" if name.startswith("sd.page") else name.split(".")[0] for name in names}
    return (found & set(PARTS)) - {part}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    help_group(parser, OUTPUT).add_argument("--out", type=Path, default=ROOT / "assets" / "figures" / "architecture.svg", help="picture to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read the imports and draw them."""
    args = parse_args(argv)
    check_file(args.out)
    plt.rcParams["svg.fonttype"] = "none"  # text stays text: small, and searchable
    plt.rcParams["svg.hashsalt"] = "t-stitch"  # the same bytes every time
    figure, axes = plt.subplots(figsize=(9, 4.4))
    axes.set(xlim=(0, 10), ylim=(0, 4.7))
    axes.axis("off")
    height = 0.9
    for name, ((x, y), width, what) in PARTS.items():
        colour = "#dbe9ff" if name == "tstitch" else "#eef3e6" if name not in TOP else "#f6efe4"
        axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.04", facecolor=colour, edgecolor="#555555"))
        axes.text(x, y + 0.16, f"{name}/", ha="center", va="center", fontsize=12, fontweight="bold")
        axes.text(x, y - 0.2, what, ha="center", va="center", fontsize=8.5)
    for part in PARTS:
        (x, y), _, _ = PARTS[part]
        for other in sorted(uses(part)):
            (to_x, to_y), width, _ = PARTS[other]
            if part in TOP and other == "tstitch" and len(uses(part)) > 2:  # said by the arrows to the backbones
                continue
            if to_y == y:  # beside each other
                ends = ((x - 1.1, y), (to_x + 1.1, to_y)) if to_x < x else ((x + 1.1, y), (to_x - 1.1, to_y))
            else:
                ends = ((x, y - height / 2 - 0.05), (x if other == "tstitch" else to_x + 0.12 * (x - to_x), to_y + height / 2 + 0.05))
            axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=13, color="#999999" if part in TOP else "#333333", linewidth=1))
    with atomic_path(args.out) as temporary:
        figure.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
