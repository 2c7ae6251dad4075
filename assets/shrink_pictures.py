"""Make the repository's pictures a fraction of their size. They are looked at, never measured.

    python assets/shrink_pictures.py assets/figures/*.png pretrained_models/emoji/*.png     # plots: PNG with a palette of 256 colours, in place
    python assets/shrink_pictures.py --webp figures/demo/grid.png --out assets/figures/demo_grid.webp   # pictures: WebP, lossy or exact, the smaller

A PNG that already has a palette is left as it is.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tstitch.cli import new_parser, run
from tstitch.errors import InputError
from tstitch.files import atomic_path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("pictures", type=Path, nargs="+", help="PNG files, replaced in place")
    parser.add_argument("--webp", action="store_true", help="write a WebP beside each instead, and remove the PNG")
    parser.add_argument("--out", type=Path, help="where the WebP of a single picture goes; its PNG stays")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Shrink each picture."""
    args = parse_args(argv)
    if args.out and (not args.webp or len(args.pictures) > 1):
        raise InputError("--out names the WebP of one picture; pass --webp and one file")
    for path in args.pictures:
        picture, before, out = Image.open(path), path.stat().st_size, path
        if args.webp:
            out = args.out or path.with_suffix(".webp")
            lossy, exact = io.BytesIO(), io.BytesIO()  # the exact one is smaller where large areas are flat, as on a screen
            picture.convert("RGB").save(lossy, "WEBP", quality=85, method=6)
            picture.convert("RGB").save(exact, "WEBP", lossless=True, quality=100, method=6)
            with atomic_path(out) as temporary:
                temporary.write_bytes(min(lossy.getvalue(), exact.getvalue(), key=len))
            if not args.out:
                path.unlink()
        elif picture.mode != "P":
            with atomic_path(path) as temporary:
                # Without dithering: flat areas stay flat, which is also what compresses.
                picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(temporary, optimize=True)
        print(f"{path}: {before / 1000:.0f} -> {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run(main)
