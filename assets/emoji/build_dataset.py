"""Collect the open emoji drawings (Noto, Twemoji) into one file of 64x64 pictures.

    python assets/emoji/build_dataset.py                       # fetches two npm packages, writes data/emoji/emoji64.npz
    python assets/emoji/build_dataset.py --tarballs google=G.tgz twitter=T.tgz

Every drawing is composed on white. Its label is its category (nine classes, the Unicode order), skin tones included. One emoji in ten is held out,
with all its drawings and skin tones. (A few flags are drawn alike for two territories, so a held-out picture can still have a twin among the others; the
last line printed counts them.)
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tstitch.cli import new_parser, run
from tstitch.errors import InputError
from tstitch.files import atomic_path
from tstitch.presets import EMOJI_CLASSES

DRAWING_SETS = ("google", "twitter")  # Noto Emoji and Twemoji, as the npm packages name them
VERSION = "16.0.0"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/emoji/emoji64.npz"), help="file to write")
    parser.add_argument("--tarballs", nargs=2, metavar="SET=FILE", help="npm tarballs already at hand, instead of fetching them")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="keep only N drawings, spread over the whole set (0: all)")
    return parser.parse_args(argv)


def fetch(folder: Path) -> dict[str, Path]:
    """Download the two npm packages into `folder`; returns drawing set -> tarball."""
    names = {name: f"emoji-datasource-{name}@{VERSION}" for name in DRAWING_SETS}
    for package in names.values():
        try:
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise InputError(f"could not fetch {package} with npm ({error}); install npm, or pass the tarballs with --tarballs") from None
    return {name: folder / f"emoji-datasource-{name}-{VERSION}.tgz" for name in DRAWING_SETS}


def on_white(png: bytes) -> np.ndarray:
    """Decode a PNG with transparency onto white; uint8 (64, 64, 3)."""
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, drawing).convert("RGB"))


def read_drawings(tarball: Path, drawing_set: str) -> list[dict]:
    """Read one package: a record for each drawing, with its skin tones."""
    pictures, emoji = {}, []
    prefix = f"package/img/{drawing_set}/64/"
    try:
        with tarfile.open(tarball) as archive:
            for member in tqdm(archive, desc=drawing_set, unit="file"):
                if member.name == "package/emoji.json":
                    emoji = json.load(archive.extractfile(member))
                elif member.name.startswith(prefix):
                    pictures[member.name.removeprefix(prefix)] = archive.extractfile(member).read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"{tarball} is no readable npm package ({error}); fetch it again") from None
    if not pictures or not emoji:
        raise InputError(f"{tarball} holds no drawings of {drawing_set} at 64 pixels; pass the package emoji-datasource-{drawing_set} {VERSION}")
    records = []
    for entry in emoji:
        if entry["category"] not in EMOJI_CLASSES:  # "Component" holds bare skin-tone swatches
            continue
        for variant in [entry, *entry.get("skin_variations", {}).values()]:
            if variant["image"] in pictures:
                records.append(
                    {
                        "image": on_white(pictures[variant["image"]]),
                        "label": EMOJI_CLASSES.index(entry["category"]),
                        "drawing_set": DRAWING_SETS.index(drawing_set),
                        "name": (entry["name"] or entry["short_name"]).lower(),
                        "held_out": zlib.crc32(entry["unified"].encode()) % 10 == 0,
                    }
                )
    return records


def main(argv: list[str] | None = None) -> None:
    """Build the file."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        tarballs = dict(item.partition("=")[::2] for item in args.tarballs) if args.tarballs else fetch(Path(folder))
        if sorted(tarballs) != sorted(DRAWING_SETS):
            raise InputError(f"--tarballs needs google=FILE twitter=FILE, got {args.tarballs}")
        records = [record for name in DRAWING_SETS for record in read_drawings(Path(tarballs[name]), name)]
    if args.sample:
        records = [records[i] for i in np.linspace(0, len(records) - 1, args.sample).round().astype(int)]
    columns = {key: np.array([record[key] for record in records]) for key in records[0]}
    with atomic_path(args.out) as temporary:
        np.savez_compressed(temporary, **columns)
    counts = ", ".join(f"{name} {n}" for name, n in zip(EMOJI_CLASSES, np.bincount(columns["label"], minlength=9), strict=True))
    trained_on = {record["image"].tobytes() for record in records if not record["held_out"]}
    twins = sum(record["held_out"] and record["image"].tobytes() in trained_on for record in records)
    print(f"{twins} held-out drawings have an identical twin among the others")
    print(f"{len(records)} drawings, {columns['held_out'].sum()} of them held out ({counts}) -> {args.out}")


if __name__ == "__main__":
    run(main)
