"""Encode the training drawings with the emoji VAE into a feature folder for dit/train.py.

python assets/emoji/encode_latents.py --vae pretrained_models/emoji/vae --out data/emoji/features
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from assets.emoji.emoji_data import DATASET, load_drawings
from tstitch.autoencoder import Autoencoder
from tstitch.checkpoints import file_hash
from tstitch.cli import new_parser, run
from tstitch.data import write_features
from tstitch.presets import EMOJI_CLASSES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATASET, help="drawings, from build_dataset.py")
    parser.add_argument("--vae", type=Path, default=Path("pretrained_models/emoji/vae"), help="autoencoder folder, diffusers format")
    parser.add_argument("--out", type=Path, default=Path("data/emoji/features"), help="feature folder to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Encode and write; drawings are not mirrored, because flags and letters have a right side."""
    args = parse_args(argv)
    drawings = load_drawings(args.data, held_out=False)
    vae = Autoencoder(args.vae)
    moments = torch.cat([vae.encode(images, batch=64) for images in tqdm(drawings.images.split(64), desc="encode", unit="batch")])
    write_features(
        args.out, moments[:, None].numpy(), drawings.labels.numpy(), num_classes=len(EMOJI_CLASSES), class_names=EMOJI_CLASSES,
        vae=vae.source, vae_hash=file_hash(vae.weights), scaling_factor=vae.scaling_factor,
    )  # fmt: skip
    std = moments[:, : vae.latent_channels].std(dim=(0, 2, 3))
    print(f"{len(moments)} features of {moments.shape[1:]} -> {args.out}; standard deviation of the means by channel {std.numpy().round(2)}")


if __name__ == "__main__":
    run(main)
