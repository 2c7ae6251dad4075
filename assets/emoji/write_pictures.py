"""Write drawings as pictures, in a folder for each class: what dit/extract_features.py, every trainer's --data-path and dit/evaluator.py read.

The 64 drawings that ship with the repository, or all that build_dataset.py fetched (--data data/emoji/emoji64.npz).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from assets.emoji.emoji_data import load_drawings
from tstitch.cli import new_parser, run
from tstitch.files import check_folder
from tstitch.plots import save_image
from tstitch.presets import EMOJI_CLASSES, ROOT


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, default=ROOT / "assets" / "emoji" / "sample64.npz", help="drawings, as build_dataset.py writes them")
    parser.add_argument("--out", type=Path, default=Path("data/my_pictures"), help="folder to write: LABEL-CLASS/NUMBER-NAME.png, 64x64 pixels")
    parser.add_argument("--split", action="store_true", help="write OUT/train and OUT/validation, the drawings that are held out from training")
    return parser.parse_args(argv)


def plain(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(argv: list[str] | None = None) -> None:
    """Write training and held-out drawings, together or apart."""
    args = parse_args(argv)
    parts = [(load_drawings(args.data, held_out), args.out / name if args.split else args.out) for name, held_out in (("train", False), ("validation", True))]
    check_folder(args.out)
    drawings = [drawing for part, folder in parts for drawing in zip(part.images, part.labels.tolist(), part.names, [folder] * len(part.names), strict=True)]
    for number, (image, label, name, folder) in enumerate(tqdm(drawings, desc="write", unit="picture")):
        # Numbered: classes so that their order by name is that of the bundled models, drawings since both drawing sets hold one of each name.
        save_image(folder / f"{label}-{plain(EMOJI_CLASSES[label])}" / f"{number:04d}-{plain(name)}.png", Image.fromarray(image.permute(1, 2, 0).numpy()))
    print(f"{len(drawings)} pictures of {len({label for _, label, *_ in drawings})} classes -> {args.out}")


if __name__ == "__main__":
    run(main)
