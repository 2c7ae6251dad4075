"""Make the repository's pictures a third of their size: PNG with a palette of 256 colours. They are looked at, never measured.

    python assets/shrink_pictures.py assets/figures/*.png pretrained_models/emoji/*.png

A picture that already has a palette is left as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tstitch.cli import new_parser, run
from tstitch.files import atomic_path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("pictures", type=Path, nargs="+", help="PNG files, replaced in place")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Shrink each picture."""
    for path in parse_args(argv).pictures:
        picture = Image.open(path)
        if picture.mode == "P":
            continue
        before = path.stat().st_size
        with atomic_path(path) as temporary:
            # Without dithering: flat areas stay flat, which is also what compresses.
            picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(temporary, optimize=True)
        print(f"{path}: {before / 1000:.0f} -> {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run(main)
