"""What makes training fast: gradient checkpointing x precision x features extracted beforehand, against the plain loop.

    python benchmarks/train_speed.py
    python benchmarks/train_speed.py --model DiT-XL/2 --batch-size 32 --image-size 256 --vae-channels 128 --vae-blocks 4

The plain loop trains in fp32 without checkpointing and encodes its pictures in every step. Peak memory comes from a process of its
own for each variant: what torch allocated on a GPU, growth of the resident set on a CPU. Weights and pictures are random: neither changes the speed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import Record, add_bench_args
from dit.checkpoints import DIT_CONFIGS, build_dit
from tstitch.cli import new_parser, parse_device, positive_int, run
from tstitch.diffusion import create_diffusion
from tstitch.torchvision_compat import prepare_torchvision
from tstitch.training import EMA, peak_memory


class Variant(NamedTuple):
    """One way to train."""

    checkpointing: bool
    mixed_precision: bool
    features: bool

    def __str__(self) -> str:
        words = zip(self, ("gradient checkpointing", "bf16", "features"), strict=True)
        return ", ".join(word for chosen, word in words if chosen) or "plain"


# Plain first.
VARIANTS = [Variant(*flags) for flags in itertools.product((False, True), repeat=3)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", choices=DIT_CONFIGS, default="emoji-large", help="model size")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="pictures a step")
    parser.add_argument("--image-size", type=positive_int, default=64, help="height and width of the pictures")
    parser.add_argument("--vae-channels", type=positive_int, default=32, help="channels of the autoencoder's first block (128: Stable Diffusion's)")
    parser.add_argument("--vae-blocks", type=positive_int, default=3, help="blocks of the autoencoder, each but the last halves (4: Stable Diffusion's)")
    parser.add_argument("--variant", type=int, choices=range(len(VARIANTS)), help="run one variant alone and print its peak memory; used by the script itself")
    add_bench_args(parser, rounds=5)
    return parser.parse_args(argv)


def make_step(args: argparse.Namespace, device: torch.device, variant: Variant, model: torch.nn.Module, vae: torch.nn.Module) -> Callable[[], None]:
    """One training step as a function: data, loss, backward, optimizer, moving average."""
    diffusion, ema = create_diffusion(""), EMA(model, 0.9999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    channels, size, _ = model.latent_shape
    pictures = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    moments = torch.randn(args.batch_size, 2 * channels, size, size).half()
    y = torch.randint(model.num_classes, (args.batch_size,), device=device)

    def step() -> None:
        model.gradient_checkpointing = variant.checkpointing
        with torch.autocast(device.type, torch.bfloat16, enabled=variant.mixed_precision):
            if variant.features:
                mean, log_variance = moments.to(device).float().chunk(2, dim=1)
                x_0 = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            else:
                with torch.no_grad():
                    x_0 = vae.encode(pictures).latent_dist.sample().float()
            t = torch.randint(diffusion.num_timesteps, (args.batch_size,), device=device)
            loss = diffusion.training_losses(model, x_0, t, {"y": y})["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model, 0)

    return step


def build(args: argparse.Namespace, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The denoiser, and an autoencoder of the size asked for."""
    prepare_torchvision()
    from diffusers import AutoencoderKL

    widths = [args.vae_channels * min(4, 2**k) for k in range(args.vae_blocks)]
    vae = AutoencoderKL(
        block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * len(widths), up_block_types=["UpDecoderBlock2D"] * len(widths),
        latent_channels=4, layers_per_block=2, norm_num_groups=min(32, args.vae_channels),
    ).to(device).requires_grad_(False)  # fmt: skip
    model = build_dit(args.model, input_size=args.image_size // 2 ** (len(widths) - 1), in_channels=4, num_classes=1000).to(device)
    return model.train(), vae.eval()


def forget_peak() -> int:
    """Bytes resident now; what loading the libraries took at its height is forgotten (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_resident() -> int:
    """Most bytes that were resident since `forget_peak` (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def memory_of(args: argparse.Namespace, k: int) -> float:
    """Peak MiB of variant k, measured in a process of its own."""
    words = ["--model", args.model, "--batch-size", args.batch_size, "--image-size", args.image_size, "--vae-channels", args.vae_channels]
    words += ["--vae-blocks", args.vae_blocks, "--device", args.device, "--variant", k]
    done = subprocess.run([sys.executable, __file__, *map(str, words)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_mib"]


def main(argv: list[str] | None = None) -> None:
    """Time all variants in turn, then measure the memory of each."""
    args = parse_args(argv)
    device = parse_device(args.device)
    torch.manual_seed(0)
    model, vae = build(args, device)
    if args.variant is not None:
        before = 0 if device.type == "cuda" else forget_peak()
        step = make_step(args, device, VARIANTS[args.variant], model, vae)
        step()
        step()
        print(json.dumps({"peak_mib": ((peak_memory(device) if device.type == "cuda" else peak_resident()) - before) / 2**20}))
        return
    record = Record("train_speed", args)
    comparison = record.compare({str(variant): make_step(args, device, variant, model, vae) for variant in VARIANTS})
    del model, vae
    memory = [memory_of(args, k) for k in tqdm(range(len(VARIANTS)), desc="memory", unit="variant")]
    record.add(
        f"{args.model}, batch {args.batch_size}, {args.image_size}x{args.image_size} pictures",
        comparison,
        against={str(variant): {"plain": "plain"} for variant in VARIANTS[1:]},
        settings={key: getattr(args, key) for key in ("model", "batch_size", "image_size", "vae_channels", "vae_blocks")},
        notes={str(variant): {"peak MiB": round(mib), "memory / plain": f"{mib / memory[0]:.2f}"} for variant, mib in zip(VARIANTS, memory, strict=True)},
    )
    record.show()


if __name__ == "__main__":
    run(main)
