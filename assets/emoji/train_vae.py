"""Train the tiny emoji autoencoder: 64x64 pictures <-> latents of 4x16x16 (a diffusers AutoencoderKL).

python assets/emoji/train_vae.py --results-dir runs/emoji-vae     # resumes by itself after a kill
python assets/emoji/train_vae.py --results-dir runs/emoji-vae --export pretrained_models/emoji/vae
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from assets.emoji.emoji_data import DATASET, Drawings, load_drawings
from tstitch.autoencoder import to_uint8
from tstitch.cli import new_parser, positive_int, run
from tstitch.data import class_weights
from tstitch.torchvision_compat import prepare_torchvision
from tstitch.training import cosine_lr, fit

prepare_torchvision()
from diffusers import AutoencoderKL


def build_vae() -> AutoencoderKL:
    """About 0.8 M parameters; no attention, which at 16x16 would cost more than it brings on drawings."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,  # the latents are brought to unit variance inside quant_conv, channel by channel
        mid_block_add_attention=False,
    )
    # Begin with little posterior noise: at unit noise the decoder never sees a signal and settles on the mean picture.
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.latent_channels :] = -5.0
    return vae


class VAELoss(nn.Module):
    """Reconstruction and KL terms for images in [-1, 1], (N, 3, 64, 64)."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float) -> None:
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """L1 + 4 MSE + 0.5 L1 of the image gradients (edges stay sharp) + kl_weight * KL per latent number."""
        moments = self.vae.encode(x).latent_dist
        mean, log_var = moments.mean.float(), moments.logvar.float()
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        error = self.vae.decode(z).sample.float() - x
        l1, mse = error.abs().mean(), error.square().mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
        return {"loss": l1 + 4 * mse + 0.5 * edges + self.kl_weight * kl, "l1": l1, "mse": mse, "kl": kl}


@torch.no_grad()
def psnr(vae: AutoencoderKL, drawings: Drawings) -> tuple[float, float]:
    """Peak signal-to-noise ratio in dB of 8-bit pictures decoded from the posterior mean: the mean over pictures, and that of the pooled squared error."""
    errors = []
    for index in tqdm(torch.arange(len(drawings.labels)).split(64), desc="psnr", unit="batch"):
        decoded = vae.decode(vae.encode(drawings.batch(index)).latent_dist.mean).sample
        errors.append((to_uint8(decoded).float() - drawings.images[index].float()).square().mean(dim=(1, 2, 3)))
    error = torch.cat(errors).clamp(min=1e-3)
    return (10 * torch.log10(255**2 / error)).mean().item(), 10 * math.log10(255**2 / error.mean().item())


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, drawings: Drawings, num_draws: int = 4096) -> None:
    """Make every latent channel zero-mean and unit-variance over `num_draws` drawings, by folding the change into the two 1x1 convolutions.

    quant_conv maps encoder features to (mean, log variance) and post_quant_conv opens the decoder, so the pictures stay the same.
    """
    weights = class_weights(drawings.labels, 1.0)
    index = torch.multinomial(weights, num_draws, replacement=True, generator=torch.Generator().manual_seed(0))
    moments = [vae.encode(drawings.batch(part)).latent_dist for part in index.split(64)]
    mean = torch.cat([m.mean for m in moments])
    variance = torch.cat([m.var for m in moments]).mean(dim=(0, 2, 3)) + mean.var(dim=(0, 2, 3))
    shift, scale = mean.mean(dim=(0, 2, 3)), variance.sqrt()
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(scale)
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.bias[channels:] -= 2 * scale.log()
    post.bias += (post.weight[:, :, 0, 0] * shift).sum(dim=1)
    post.weight *= scale[None, :, None, None]


def export(vae: AutoencoderKL, folder: Path) -> None:
    """Write a diffusers folder in fp16; each of its files appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        vae.half().save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            file.replace(folder / file.name)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATASET, help="drawings, from build_dataset.py")
    parser.add_argument("--results-dir", type=Path, default=Path("runs/emoji-vae"), help="run folder")
    parser.add_argument("--max-steps", type=positive_int, default=3300, help="optimizer steps")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="drawings a step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate, cosine decay")
    parser.add_argument("--kl-weight", type=float, default=1e-4, help="weight of the KL term per latent number")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="bf16", help="autocast type of the training step")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation, batches and noise")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the EMA weights, normalised, fp16, in diffusers format")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, report PSNR on held-out drawings, export."""
    args = parse_args(argv)
    drawings, held_out = load_drawings(args.data, held_out=False), load_drawings(args.data, held_out=True)
    weights = class_weights(drawings.labels, 0.5)
    torch.manual_seed(args.seed)
    model = VAELoss(build_vae(), args.kl_weight).to(memory_format=torch.channels_last)

    def losses(model: nn.Module, step: int, part: int) -> dict[str, Tensor]:
        index = torch.multinomial(weights, args.batch_size, replacement=True)
        return model(drawings.batch(index).to(accelerator.device, memory_format=torch.channels_last))

    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    config = {k: getattr(args, k) for k in ("max_steps", "batch_size", "lr", "kl_weight", "mixed_precision", "seed")}
    average = fit(
        model, losses, accelerator=accelerator, folder=args.results_dir, config=config, max_steps=args.max_steps, items_per_step=args.batch_size,
        optimizer=torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0),
        lr_factor=lambda step: cosine_lr(step, args.max_steps, warmup_steps=100), ema_decay=0.998, seed=args.seed,
    )  # fmt: skip
    model.load_state_dict(average)
    vae = model.vae.float().cpu().eval()
    if args.export:
        normalize_latents(vae, drawings)
        export(vae, args.export)
        vae = AutoencoderKL.from_pretrained(args.export)  # what ships is what is measured
    mean, pooled = psnr(vae, held_out)
    print(f"held-out PSNR over {len(held_out.labels)} drawings: {mean:.2f} dB (mean of the pictures'), {pooled:.2f} dB (of the pooled error)")


if __name__ == "__main__":
    run(main)
