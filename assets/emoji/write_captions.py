"""Say in words what each training drawing shows: data/emoji/features/captions.jsonl, a line for each feature, in their order.

    python assets/emoji/write_captions.py                      # fetches three npm packages
    python assets/emoji/write_captions.py --tarballs google=G.tgz twitter=T.tgz --names N.tgz

A line has "text", the full caption, and what it is made of: "names" (the Unicode short name first, then older ones), "skin_tone" ("" for none),
"style" (google or twitter), "category" and "emoji" (code points, the same for all drawings of one emoji).
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from assets.emoji.build_dataset import DRAWING_SETS, Variant, drawing_packages, fetch, read_package
from assets.emoji.emoji_data import DATASET
from sd.emoji_text import join_caption
from tstitch.cli import new_parser, run
from tstitch.errors import InputError
from tstitch.files import atomic_path

NAMES_VERSION = "0.9.0"  # of unicode-emoji-json: the names of Unicode's CLDR, "red heart" where the older list says "heavy black heart"
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATASET, help="drawings, from build_dataset.py")
    parser.add_argument("--out", type=Path, default=Path("data/emoji/features/captions.jsonl"), help="file to write")
    parser.add_argument("--tarballs", nargs=2, metavar="SET=FILE", help="npm tarballs of the drawings already at hand, instead of fetching them")
    parser.add_argument("--names", type=Path, metavar="FILE", help="npm tarball of unicode-emoji-json already at hand")
    return parser.parse_args(argv)


def code_points(text: str) -> str:
    """Code points of an emoji in hexadecimal, joined by hyphens, without the variation selector that not every list writes."""
    return "-".join(f"{ord(letter):04X}" for letter in text if letter != "\ufe0f")


def read_names(tarball: Path) -> dict[str, str]:
    """Code points -> Unicode short name.

    Raises:
        InputError: if the tarball cannot be read.
    """
    try:
        with tarfile.open(tarball) as archive:
            names = json.load(archive.extractfile("package/data-by-emoji.json"))
        return {code_points(emoji): entry["name"] for emoji, entry in names.items()}
    except (OSError, EOFError, LookupError, TypeError, AttributeError, ValueError, tarfile.TarError) as error:
        raise InputError(f"{tarball} is no readable package unicode-emoji-json ({error}); fetch it again") from None


def describe(variant: Variant, style: str, unicode_names: dict[str, str]) -> dict[str, object]:
    """The line of one drawing."""
    entry = variant.entry
    emoji = code_points("".join(chr(int(point, 16)) for point in entry["unified"].split("-")))
    older = [entry["name"] or "", *(name.replace("_", " ").replace("-", " ") for name in entry["short_names"])]
    names = list(dict.fromkeys(name.lower() for name in (unicode_names.get(emoji, ""), *older) if name))
    tones = " and ".join(SKIN_TONES[tone] for tone in variant.skin_tones.split("-") if tone)
    skin_tone = f"{tones} skin tone" if tones else ""
    caption = {"names": names, "skin_tone": skin_tone, "style": style, "category": entry["category"].lower(), "emoji": emoji}
    return {"text": join_caption(names[0], skin_tone, style), **caption}


def main(argv: list[str] | None = None) -> None:
    """Write the captions, once it is certain that they belong to the drawings."""
    args = parse_args(argv)
    if not args.data.exists():
        raise InputError(f"no drawings at {args.data}; make them with python assets/emoji/build_dataset.py")
    with tempfile.TemporaryDirectory() as folder:
        tarballs = drawing_packages(args.tarballs, Path(folder))
        unicode_names = read_names(args.names or fetch(Path(folder), "unicode-emoji-json", NAMES_VERSION))
        variants = [(variant, style) for style in DRAWING_SETS for variant in read_package(tarballs[style], style)[0]]
    with np.load(args.data) as drawings:
        names, held_out = drawings["name"].tolist(), drawings["held_out"]
    if names != [(variant.entry["name"] or variant.entry["short_name"]).lower() for variant, _ in variants]:
        raise InputError(f"{args.data} does not hold the drawings of these packages in their order; make it again with build_dataset.py")
    rows = [describe(variant, style, unicode_names) for (variant, style), held in zip(variants, held_out, strict=True) if not held]
    with atomic_path(args.out) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} captions of {len({row['emoji'] for row in rows})} emoji -> {args.out}; the first: {rows[0]['text']}")


if __name__ == "__main__":
    run(main)
