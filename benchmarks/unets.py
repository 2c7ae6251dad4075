"""Diffusers' U-Nets and autoencoder on the bundled LDM and SD pairs: which of diffusers' own switches pay on this machine, and what sharing steps saves.

    python benchmarks/unets.py
    python benchmarks/unets.py --cases ldm --batch 8 --num-steps 50

Cases: `ldm` and `sd` are one DDIM run at ratio 0.5, `ldm-ratios` all 11 ratios of LDM, `pipeline` SD's large U-Net alone, in diffusers' pipeline and in
ours, `decode` the autoencoder. `plain` is what diffusers' loading gives. Switches: memory format channels-last, q, k and v as one product, attention
without the fused kernel, bf16.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import Record, add_bench_args
from ldm.checkpoints import load_ldm_denoisers
from ldm.sampling import ldm_diffusion
from tstitch.autoencoder import Autoencoder
from tstitch.cli import new_parser, positive_int, run
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.noise import SampleNoise
from tstitch.presets import LDM_PRESETS
from tstitch.sampling import sample
from tstitch.schedule import StitchSchedule, two_way_ratios
from tstitch.solvers import DDIM
from tstitch.sweep import sample_many

Switch = Callable[[nn.Module], object]


def channels_last(network: nn.Module) -> None:
    """Memory format of the convolutions' weights, which their results take over."""
    network.to(memory_format=torch.channels_last)


def fused(network: nn.Module) -> None:
    """Q, k and v of self-attention as one matrix product, k and v of cross-attention as one."""
    network.fuse_qkv_projections()


def unfused_kernel(network: nn.Module) -> None:
    """Attention as two products and a softmax."""
    from diffusers.models.attention_processor import AttnProcessor

    network.set_attn_processor(AttnProcessor())


def bf16(network: nn.Module) -> None:
    """Weights in bfloat16."""
    nn.Module.to(network, torch.bfloat16)


SWITCHES: dict[str, tuple[Switch, ...]] = {
    "plain": (),
    "channels-last": (channels_last,),
    "fused projections": (fused,),
    "channels-last, fused projections": (channels_last, fused),
    "unfused attention": (unfused_kernel,),
    "bf16": (bf16,),
    "bf16, channels-last": (bf16, channels_last),
    "bf16, channels-last, fused projections": (bf16, channels_last, fused),
    "bf16, unfused attention": (bf16, unfused_kernel),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to time")
    parser.add_argument("--batch", type=positive_int, default=4, help="pictures; one for ldm-ratios")
    parser.add_argument("--num-steps", type=positive_int, default=50, help="DDIM steps")
    parser.add_argument("--switches", nargs="+", choices=SWITCHES, default=list(SWITCHES), metavar="NAME", help="what to switch; plain is always timed")
    add_bench_args(parser, rounds=5)
    return parser.parse_args(argv)


def switched(network: nn.Module, switches: tuple[Switch, ...]) -> nn.Module:
    """A copy with these switches on."""
    network = copy.deepcopy(network)
    for switch in switches:
        switch(network)
    return network


def ldm_case(args: argparse.Namespace, device: torch.device, ratios: bool = False) -> Mapping[str, Callable[[], Tensor]]:
    """LDM's emoji pair at ratio 0.5 or, with `ratios`, at all of them one after another and shared."""
    preset = LDM_PRESETS["emoji"]
    pair = [load_ldm_denoisers(file.path)[0].to(device) for file in preset.denoisers]
    noise = SampleNoise(range(1 if ratios else args.batch))
    x_T, y = noise.latents(pair[0].latent_shape, device), noise.labels(preset.num_classes).to(device)
    guidance = ClassifierFreeGuidance(preset.cfg_scale, preset.num_classes, preset.cfg_channels)
    how = {"solver": DDIM(ldm_diffusion(args.num_steps)), "guidance": guidance}

    def switch_on(switches: tuple[Switch, ...]) -> list[nn.Module]:
        models = [copy.deepcopy(model) for model in pair]
        for model in models:
            model.unet = switched(model.unet, switches)
            model.embedder.to(model.unet.dtype)
        return models

    def each(models: list[nn.Module]) -> Tensor:
        return torch.stack(
            [sample(models, x_T, y, schedule=schedule, **how) for schedule in (two_way_ratios() if ratios else [StitchSchedule.from_ratio(0.5)])]
        )

    def together(models: list[nn.Module]) -> Tensor:
        return torch.stack(sample_many(models, x_T, y, schedules=two_way_ratios(), **how))

    found = {name: partial(each, switch_on(SWITCHES[name])) for name in (["plain"] if ratios else args.switches)}
    return found | ({f"shared, {name}": partial(together, switch_on(SWITCHES[name])) for name in args.switches} if ratios else {})


def sd_case(args: argparse.Namespace, device: torch.device, alone: bool = False) -> Mapping[str, Callable[[], Tensor]]:
    """SD's emoji pair at ratio 0.5 or, with `alone`, the large U-Net in diffusers' own pipeline and in ours at ratio 0; up to the latents."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from sd.tstitch_sd_utils import get_tstitch_pipepline

    def load(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
        pipe = get_tstitch_pipepline("emoji", device=device, dtype=dtype)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(pipe: StableDiffusionPipeline, **how: float) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(args.batch)]
        prompts = ["red heart"] * args.batch
        return pipe(prompts, num_inference_steps=args.num_steps, guidance_scale=3.0, generator=generators, output_type="latent", **how).images

    if alone:
        ours = load()
        parts = {name: part for name, part in ours.components.items() if name != "unet"}
        theirs = StableDiffusionPipeline(**parts, unet=ours.unet.large, requires_safety_checker=False)
        theirs.set_progress_bar_config(disable=True)
        return {
            "plain": partial(draw, theirs),
            "ours, ratio 0": partial(draw, ours, unet_s_ratio=0.0),
            "ours, ratio 0.5": partial(draw, ours, unet_s_ratio=0.5),
        }
    pipes = {}
    for name in args.switches:
        pipes[name] = load(torch.bfloat16 if bf16 in SWITCHES[name] else torch.float32)
        for unet in pipes[name].unet.unets:
            for switch in SWITCHES[name]:
                switch(unet)
    return {name: partial(draw, pipe, unet_s_ratio=0.5) for name, pipe in pipes.items()}


def decode_case(args: argparse.Namespace, device: torch.device) -> Mapping[str, Callable[[], Tensor]]:
    """The emoji autoencoder's decoder."""
    vae = Autoencoder(LDM_PRESETS["emoji"].vae, device).vae.to(memory_format=torch.contiguous_format)  # as diffusers' loading leaves it
    z = torch.randn(args.batch, vae.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)

    def decode(network: nn.Module) -> Tensor:
        return network.decode(z.to(network.dtype)).sample

    return {name: partial(decode, switched(vae, SWITCHES[name])) for name in args.switches}


CASES: dict[str, Callable[[argparse.Namespace, torch.device], Mapping[str, Callable[[], Tensor]]]] = {
    "ldm": ldm_case,
    "ldm-ratios": partial(ldm_case, ratios=True),
    "sd": sd_case,
    "pipeline": partial(sd_case, alone=True),
    "decode": decode_case,
}


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Time each case, write it, print all."""
    args = parse_args(argv)
    args.switches = list(dict.fromkeys(["plain", *args.switches]))
    record = Record("unets", args)
    for case in args.cases:
        calls = CASES[case](args, record.device)
        exact = calls["plain"]().float()
        images = 1 if case == "ldm-ratios" else args.batch
        record.measure(
            f"{case}, {images} images" + (f", {args.num_steps} steps" if case != "decode" else ""),
            calls,
            against={name: {"plain": "plain"} for name in calls if name != "plain"},
            settings={"batch": images, "num_steps": args.num_steps},
            notes={name: {"max diff": ((call().float() - exact).abs().max() / exact.abs().max()).item()} for name, call in calls.items()},
        )
    record.show()


if __name__ == "__main__":
    run(main)
