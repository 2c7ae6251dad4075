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
from dataclasses import dataclass
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


def fetch(folder: Path, name: str, version: str) -> Path:
    """Download an npm package into `folder`; returns its tarball.

    Raises:
        InputError: without npm, or without a network.
    """
    try:
        subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise InputError(f"could not fetch {name}@{version} with npm ({error}); install npm, or pass the tarballs with --tarballs") from None
    return folder / f"{name}-{version}.tgz"


def drawing_packages(given: list[str] | None, folder: Path) -> dict[str, Path]:
    """Drawing set -> tarball: what --tarballs gave, or what is downloaded into `folder`.

    Raises:
        InputError: if --tarballs does not name both sets.
    """
    if not given:
        return {name: fetch(folder, f"emoji-datasource-{name}", VERSION) for name in DRAWING_SETS}
    tarballs = {name: Path(path) for name, path in (item.split("=", 1) for item in given if "=" in item)}
    if sorted(tarballs) != sorted(DRAWING_SETS):
        raise InputError(f"--tarballs needs google=FILE twitter=FILE, got {given}")
    return tarballs


def on_white(png: bytes) -> np.ndarray:
    """Decode a PNG with transparency onto white; uint8 (64, 64, 3)."""
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, drawing).convert("RGB"))


@dataclass(frozen=True)
class Variant:
    """One drawing of one emoji: its entry of emoji.json, its skin tones as code points ("1F3FD", two of them with a hyphen, or ""), its file."""

    entry: dict
    skin_tones: str
    image: str

    @property
    def held_out(self) -> bool:
        """Whether the emoji is one of the tenth that no model sees."""
        return zlib.crc32(self.entry["unified"].encode()) % 10 == 0


def read_package(tarball: Path, drawing_set: str) -> tuple[list[Variant], dict[str, bytes]]:
    """Read one package: the drawings of one set in their order, and the PNG of each file.

    Raises:
        InputError: if the tarball cannot be read, or holds no drawings of that set.
    """
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
    variants = []
    for entry in emoji:
        if entry["category"] not in EMOJI_CLASSES:  # "Component" holds bare skin-tone swatches
            continue
        for skin_tones, variant in [("", entry), *entry.get("skin_variations", {}).items()]:
            if variant["image"] in pictures:
                variants.append(Variant(entry, skin_tones, variant["image"]))
    return variants, pictures


def read_drawings(tarball: Path, drawing_set: str) -> list[dict]:
    """Read one package: a record for each drawing, with its skin tones."""
    variants, pictures = read_package(tarball, drawing_set)
    return [
        {
            "image": on_white(pictures[variant.image]),
            "label": EMOJI_CLASSES.index(variant.entry["category"]),
            "drawing_set": DRAWING_SETS.index(drawing_set),
            "name": (variant.entry["name"] or variant.entry["short_name"]).lower(),
            "held_out": variant.held_out,
        }
        for variant in variants
    ]


def main(argv: list[str] | None = None) -> None:
    """Build the file."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        tarballs = drawing_packages(args.tarballs, Path(folder))
        records = [record for name in DRAWING_SETS for record in read_drawings(tarballs[name], name)]
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
