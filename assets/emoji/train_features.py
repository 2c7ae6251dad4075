"""Train the network behind FD-emoji, and measure its reference statistics.

    python assets/emoji/train_features.py --results-dir runs/emoji-features --export pretrained_models/emoji

The network learns category and drawing set of the training drawings. Its features are a ruler for this project's own emoji models; a value of FD-emoji
means nothing beside a FID.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.numpy import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from assets.emoji.emoji_data import DATASET, Drawings, load_drawings
from tstitch.checkpoints import save_weights
from tstitch.cli import new_parser, positive_int, run
from tstitch.data import class_weights
from tstitch.files import atomic_path
from tstitch.metrics import frechet_distance
from tstitch.metrics.emoji import EmojiFeatures
from tstitch.metrics.extractors import create_extractor, gather
from tstitch.training import cosine_lr, fit


def shifted(images: Tensor, pixels: int) -> Tensor:
    """Move each picture by up to `pixels` in both directions, white coming in."""
    padded = F.pad(images, [pixels] * 4, value=255)
    size = images.shape[-1]
    offsets = torch.randint(2 * pixels + 1, (len(images), 2)).tolist()
    return torch.stack([picture[:, r : r + size, c : c + size] for picture, (r, c) in zip(padded, offsets, strict=True)])


def accuracy(network: EmojiFeatures, drawings: Drawings) -> tuple[float, float]:
    """Share of drawings whose category, and whose drawing set, is recognised."""
    right = torch.zeros(2)
    for index in torch.arange(len(drawings.labels)).split(256):
        category, drawing_set = network(drawings.images[index])
        right[0] += (category.argmax(1) == drawings.labels[index]).sum()
        right[1] += (drawing_set.argmax(1) == drawings.drawing_sets[index]).sum()
    return tuple((right / len(drawings.labels)).tolist())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATASET, help="drawings, from build_dataset.py")
    parser.add_argument("--results-dir", type=Path, default=Path("runs/emoji-features"), help="run folder")
    parser.add_argument("--max-steps", type=positive_int, default=2000, help="optimizer steps")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="drawings a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate, cosine decay")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation, batches and shifts")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write features.safetensors and reference.safetensors here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, report accuracy on held-out drawings, export weights and reference statistics."""
    args = parse_args(argv)
    drawings, held_out = load_drawings(args.data, held_out=False), load_drawings(args.data, held_out=True)
    weights = class_weights(drawings.labels, 0.5)
    torch.manual_seed(args.seed)

    def losses(model: nn.Module, step: int, part: int) -> dict[str, Tensor]:
        index = torch.multinomial(weights, args.batch_size, replacement=True)
        category, drawing_set = model(shifted(drawings.images[index], pixels=4))
        category_loss, set_loss = F.cross_entropy(category, drawings.labels[index]), F.cross_entropy(drawing_set, drawings.drawing_sets[index])
        return {"loss": category_loss + set_loss, "category": category_loss, "drawing_set": set_loss}

    model = EmojiFeatures()
    config = {k: getattr(args, k) for k in ("max_steps", "batch_size", "lr", "seed")}
    average = fit(
        model, losses, accelerator=Accelerator(mixed_precision="bf16", cpu=True), folder=args.results_dir, config=config, max_steps=args.max_steps,
        optimizer=torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05), seed=args.seed, items_per_step=args.batch_size,
        lr_factor=lambda step: cosine_lr(step, args.max_steps, warmup_steps=100), ema_decay=0.995,
    )  # fmt: skip
    network = EmojiFeatures()
    network.load_state_dict(average)
    network.eval()
    category, drawing_set = accuracy(network, held_out)
    print(f"held-out accuracy: category {category:.3f}, drawing set {drawing_set:.3f}")
    if args.export:
        save_weights(args.export / "features.safetensors", network.state_dict(), model.config)
        export_reference(args.export, drawings, held_out)


def export_reference(folder: Path, drawings: Drawings, held_out: Drawings) -> None:
    """Write mean and covariance of the features of training and of held-out drawings, every class with the same weight."""
    extractor = create_extractor("emoji", folder=folder)  # what ships is what measures
    tensors = {}
    for name, part in (("train", drawings), ("held_out", held_out)):
        statistics = gather(extractor, part.images, class_weights(part.labels, 1.0))
        tensors |= {f"{name}.mu": statistics.mean, f"{name}.sigma": statistics.covariance}
    with atomic_path(folder / "reference.safetensors") as temporary:
        save_file(tensors, temporary)
    reference = extractor.references()
    print(f"FD-emoji of the held-out drawings to the training drawings: {frechet_distance(*reference['held_out'], *reference['train']):.2f}")


if __name__ == "__main__":
    run(main)
