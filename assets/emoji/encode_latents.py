"""Encode the training drawings with the emoji VAE into a feature folder for dit/train.py.

python assets/emoji/encode_latents.py --vae pretrained_models/emoji/vae --out data/emoji/features
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from assets.emoji.emoji_data import DATASET, load_drawings
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


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Encode and write; drawings are not mirrored, because flags and letters have a right side."""
    args = parse_args(argv)
    drawings = load_drawings(args.data, held_out=False)
    vae = AutoencoderKL.from_pretrained(args.vae)
    batches = torch.arange(len(drawings.labels)).split(64)
    parameters = [vae.encode(drawings.batch(index)).latent_dist.parameters for index in tqdm(batches, desc="encode", unit="batch")]
    moments = torch.cat(parameters).numpy()[:, None]
    labels = np.asarray(drawings.labels)
    write_features(args.out, moments, labels, num_classes=len(EMOJI_CLASSES), vae=str(args.vae), scaling_factor=vae.config.scaling_factor)
    std = moments[:, 0, :4].std(axis=(0, 2, 3))
    print(f"{len(labels)} features of shape {moments.shape[1:]} -> {args.out}; standard deviation of the means by channel {std.round(2)}")


if __name__ == "__main__":
    run(main)
