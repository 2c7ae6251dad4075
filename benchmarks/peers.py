"""What we are measured against, with the same weights: diffusers' DiT and its pipeline, and a DiT written as it was published."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import build_dit
from dit.models import DiT
from tstitch.errors import InputError
from tstitch.guidance import Denoiser
from tstitch.torchvision_compat import prepare_torchvision


def random_dit(name: str, seed: int = 0, **arguments: int | float | bool | str) -> DiT:
    """An untrained model in eval mode that does not answer 0: what the published initialisation sets to zero is drawn from N(0, 0.02)."""
    torch.manual_seed(seed)
    model = build_dit(name, **arguments)
    zeros = [block.adaLN_modulation[-1] for block in model.blocks] + [model.final_layer.adaLN_modulation[-1], model.final_layer.linear]
    for layer in zeros:
        nn.init.normal_(layer.weight, std=0.02)
    return model.eval().requires_grad_(False)


def as_published(model: DiT) -> Denoiser:
    """The forward of facebookresearch/DiT on this model's layers, with one cast more, without which it fails in half precision.

    Fused attention in every number type, and each shift, scale and gate an operation of its own, as timm's and DiT's code have them.
    """

    def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def attend(attn: nn.Module, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = attn.qkv(x).reshape(n, tokens, 3, attn.num_heads, width // attn.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))

    def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = model.x_embedder(x.to(model.pos_embed.dtype)) + model.pos_embed
        c = model.t_embedder(t) + model.y_embedder(y)
        for block in model.blocks:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c).chunk(6, dim=1)
            h = h + gate_a.unsqueeze(1) * attend(block.attn, modulate(block.norm1(h), shift_a, scale_a))
            h = h + gate_m.unsqueeze(1) * block.mlp(modulate(block.norm2(h), shift_m, scale_m))
        last = model.final_layer
        shift, scale = last.adaLN_modulation(c).chunk(2, dim=1)
        return model.unpatchify(last.linear(modulate(last.norm_final(h), shift, scale))).to(x.dtype)

    return forward


def diffusers_dit(model: DiT) -> nn.Module:
    """Diffusers' DiTTransformer2DModel with this model's weights, number type and device.

    Raises:
        InputError: if diffusers has no such model.
    """
    prepare_torchvision()
    from diffusers import DiTTransformer2DModel

    config = model.config
    if config["posenc"] != "abs" or config["qk_norm"] or config["mlp_ratio"] != 4 or not config["class_dropout_prob"]:
        raise InputError("diffusers knows DiTs with added positions, plain q and k, an MLP of 4 widths and a null label only; choose such a model")
    theirs = DiTTransformer2DModel(
        num_attention_heads=config["num_heads"], attention_head_dim=config["hidden_size"] // config["num_heads"], in_channels=config["in_channels"],
        out_channels=model.out_channels, num_layers=config["depth"], sample_size=config["input_size"], patch_size=config["patch_size"],
        num_embeds_ada_norm=config["num_classes"], norm_eps=1e-6,
    )  # fmt: skip
    theirs.load_state_dict(_diffusers_state(model))
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # diffusers spaces the frequencies over 127, DiT over 128
    weight = model.x_embedder.proj.weight
    return nn.Module.to(theirs, weight.device, weight.dtype).eval().requires_grad_(False)  # diffusers' own to() warns of nothing


def _diffusers_state(model: DiT) -> dict[str, Tensor]:
    own, state = model.state_dict(), {}

    def put(theirs: str, ours: str) -> None:
        state.update({f"{theirs}.{part}": own[f"{ours}.{part}"] for part in ("weight", "bias")})

    put("pos_embed.proj", "x_embedder.proj")
    put("proj_out_1", "final_layer.adaLN_modulation.1")
    put("proj_out_2", "final_layer.linear")
    for k in range(model.config["depth"]):
        block, source = f"transformer_blocks.{k}", f"blocks.{k}"
        put(f"{block}.norm1.emb.timestep_embedder.linear_1", "t_embedder.mlp.0")
        put(f"{block}.norm1.emb.timestep_embedder.linear_2", "t_embedder.mlp.2")
        state[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = own["y_embedder.embedding_table.weight"]
        put(f"{block}.norm1.linear", f"{source}.adaLN_modulation.1")
        put(f"{block}.attn1.to_out.0", f"{source}.attn.proj")
        put(f"{block}.ff.net.0.proj", f"{source}.mlp.fc1")
        put(f"{block}.ff.net.2", f"{source}.mlp.fc2")
        for part in ("weight", "bias"):
            for name, value in zip("qkv", own[f"{source}.attn.qkv.{part}"].chunk(3), strict=True):
                state[f"{block}.attn1.to_{name}.{part}"] = value
    return state


def as_denoiser(theirs: nn.Module) -> Denoiser:
    """Diffusers' DiT behind our interface."""
    dtype = theirs.pos_embed.proj.weight.dtype
    return lambda x, t, y: theirs(x.to(dtype), timestep=t, class_labels=y, return_dict=False)[0].to(x.dtype)


class KeptLatents:
    """Stands where a pipeline has its autoencoder, and keeps what it was given to decode: sampling alone is timed, and latents are compared."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """Keep the latents, and return them as the pictures."""
        self.latents = latents
        return SimpleNamespace(sample=latents)


def diffusers_sampler(model: DiT, labels: list[int], num_steps: int, cfg_scale: float, seed: int = 0) -> Callable[[], Tensor]:
    """Diffusers' DiTPipeline with its DDIM, as a function that returns latents (N, C, H, W). The initial ones are torch's own N(0, 1) of that seed, on the CPU.

    The model has 1000 classes: the pipeline's null label is 1000, whatever the model says.
    """
    theirs = diffusers_dit(model)
    from diffusers import DDIMScheduler, DiTPipeline

    kept = KeptLatents()
    pipe = DiTPipeline(theirs, kept, DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        pipe(labels, guidance_scale=cfg_scale, generator=torch.Generator().manual_seed(seed), num_inference_steps=num_steps, output_type="pt")
        return kept.latents

    return run
