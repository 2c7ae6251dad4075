"""The same DiT or SiT, ready to be called many times: what does not depend on x is computed once, and weights lie as the machine wants them.

- Modulations (adaLN) depend on the timestep and the label alone. They are a third of the weights, and in small batches to read those is what they cost. So
  all blocks' are one matrix product; on a CPU, equal (timestep, label) pairs of a batch are computed once, and those of timesteps that will be walked are kept.
- On a CPU, linear layers are packed into oneDNN's own layout, with tanh-GELU at the end of the product, through operators that torch keeps to itself: where
  they are missing, or do not answer as the plain layer does, the plain layer stays.
- Or all of it is compiled (`compile=True`), which takes a minute once.

No kernel is chosen by a clock: which one runs decides the last bits of a sample, and those shall not change from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.models import DiT, DiTBlock, attend, rotate, unpatchify
from tstitch.compiled import Compiled

KEPT_BYTES = 256 * 2**20  # most memory that kept modulations of one model may take


class PackedLinear(nn.Module):
    """A linear layer in oneDNN's layout, x (..., in) -> (..., out), then tanh-GELU if asked for."""

    def __init__(self, layer: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        # Not buffers: nothing but the product can read the layout.
        self.packed = (torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()), layer.bias.detach())
        self.end = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, *self.packed, *self.end)


class PlainLinear(nn.Module):
    """The layer as it is, then tanh-GELU if asked for."""

    def __init__(self, layer: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.layer, self.gelu = layer, gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return F.gelu(x, approximate="tanh") if self.gelu else x


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have packed layers of a number type, and they answer as plain ones do, to its rounding."""
    with torch.random.fork_rng(devices=[]):  # what the caller draws next shall not depend on this
        layer = nn.Linear(64, 64, dtype=dtype)
    x = torch.linspace(-2, 2, 8 * 64).view(8, 64).to(dtype)
    ops = torch.ops.mkldnn
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    try:
        if dtype in supported and not getattr(ops, supported[dtype])():
            return False
        with torch.no_grad():
            packed, plain = PackedLinear(layer, gelu=True)(x), PlainLinear(layer, gelu=True)(x)
    except (AttributeError, RuntimeError):  # no such operator in this torch
        return False
    return torch.allclose(packed, plain, rtol=0, atol=32 * torch.finfo(dtype).eps)


def linear_kind(layer: nn.Linear, compile: bool) -> type[PackedLinear | PlainLinear]:
    """How a layer is run; the compiler packs by itself."""
    return PackedLinear if layer.weight.device.type == "cpu" and not compile and can_pack(layer.weight.dtype) else PlainLinear


class Modulations:
    """Shift, scale and gate of every norm: (t (N,), y (N,)) -> (N, 6 * depth + 2, D), where 1 is added to the scales already.

    Args:
        timesteps: those that will be walked. On a CPU their modulations are kept for each label that comes, as far as KEPT_BYTES go; () keeps none.
    """

    def __init__(self, model: DiT, timesteps: Sequence[float] = ()) -> None:
        layers = [block.adaLN_modulation[-1] for block in model.blocks] + [model.final_layer.adaLN_modulation[-1]]
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        self.bias = torch.cat([layer.bias.detach() for layer in layers])
        self.t_embedder, self.y_embedder = model.t_embedder, model.y_embedder
        self.width = self.weight.shape[1]
        vectors = len(self.weight) // self.width
        self.scales = torch.tensor([*(k for k in range(vectors - 2) if k % 6 in (1, 4)), vectors - 1], device=self.weight.device)
        different = dict.fromkeys(float(t) for t in timesteps)  # PLMS comes to its second one twice
        self.timesteps = {t: k for k, t in enumerate(different)} if self.weight.device.type == "cpu" else {}
        self.times = torch.tensor(list(self.timesteps), dtype=torch.float64)
        self.kept: dict[int, Tensor] = {}  # label -> (timesteps, 6 * depth + 2, D)
        self.most_kept = KEPT_BYTES // max(1, len(self.timesteps) * len(self.weight) * self.weight.element_size())

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        if t.device.type != "cpu":
            return self.compute(t, y)  # to look into t and y would stall the device
        pairs = list(zip(t.tolist(), y.tolist(), strict=True))
        different = list(dict.fromkeys(pairs))
        labels = dict.fromkeys(label for _, label in different)
        if self.timesteps.keys() >= {time for time, _ in different} and len(labels) <= self.most_kept:
            kept = self._of_labels(list(labels))
            rows = torch.stack([kept[label][self.timesteps[time]] for time, label in different])
        else:
            rows = self.compute(t.new_tensor([time for time, _ in different]), y.new_tensor([label for _, label in different]))
        if len(different) == len(pairs):
            return rows
        number = {pair: k for k, pair in enumerate(different)}
        return rows[torch.tensor([number[pair] for pair in pairs])]

    def _of_labels(self, labels: list[int]) -> dict[int, Tensor]:
        """The kept modulations of these labels. When a label first comes, those of all timesteps are computed together: the weights are read once.

        Each label by itself, since a product rounds differently with other rows in it, and a run that goes on after a kill meets labels in other company.
        """
        kept = dict(self.kept)
        for label in labels:
            found = kept.pop(label, None)
            kept[label] = self.compute(self.times, torch.full(self.times.shape, label)) if found is None else found
        kept = self.kept = dict(list(kept.items())[-self.most_kept :])  # the latest; a new dict each time, since two threads may call
        return kept

    def compute(self, t: Tensor, y: Tensor) -> Tensor:
        """Compute them, all blocks at once."""
        c = F.silu(self.t_embedder(t) + self.y_embedder(y))
        vectors = F.linear(c, self.weight, self.bias).unflatten(1, (-1, self.width))
        vectors[:, self.scales] += 1
        return vectors


class InferenceBlock(nn.Module):
    """One block: h (N, T, D), its six modulations, each (N, 1, D) -> h, which is changed in place."""

    def __init__(self, block: DiTBlock, linear: type[PackedLinear | PlainLinear]) -> None:
        super().__init__()
        self.eps, self.num_heads, self.turns_values = block.norm1.eps, block.attn.num_heads, block.attn.posenc == "gta"
        self.q_norm, self.k_norm = block.attn.q_norm, block.attn.k_norm
        self.qkv, self.proj = linear(block.attn.qkv), linear(block.attn.proj)
        self.fc1, self.fc2 = linear(block.mlp.fc1, gelu=True), linear(block.mlp.fc2)

    def forward(self, h: Tensor, modulation: Sequence[Tensor], rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        h = h.addcmul_(gate_a, self.proj(self._attention(modulated_norm(h, shift_a, scale_a, self.eps), rotation)))
        return h.addcmul_(gate_m, self.fc2(self.fc1(modulated_norm(h, shift_m, scale_m, self.eps))))

    def _attention(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each (N, heads, T, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            cos, sin = rotation
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            v = rotate(v, cos, sin) if self.turns_values else v
        out = attend(q, k, v)
        if self.turns_values:
            out = rotate(out, cos, -sin)
        return out.transpose(1, 2).flatten(2)  # (N, T, D)


def modulated_norm(h: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(h) * scale + shift for h (N, T, D) and shift, scale (N, 1, D); scale has its 1 already."""
    norm = F.layer_norm(h, h.shape[-1:], eps=eps)
    return torch.addcmul(shift, norm, scale, out=norm)


class InferenceDiT(nn.Module):
    """What `prepare_for_inference` makes: called as the model is, (x, t, y) -> output. It can be neither trained, differentiated nor moved."""

    def __init__(self, model: DiT, timesteps: Sequence[float] = (), compile: bool = False) -> None:
        super().__init__()
        self.config, self.latent_shape, self.num_classes = model.config, model.latent_shape, model.num_classes
        self.in_channels, self.out_channels, self.returned_channels = model.in_channels, model.out_channels, model.returned_channels
        self.patch_size, self.parameter_count = model.patch_size, sum(parameter.numel() for parameter in model.parameters())
        linear = linear_kind(model.final_layer.linear, compile)
        self.x_embedder, self.pos_embed = model.x_embedder, model.pos_embed
        self.dtype = model.x_embedder.proj.weight.dtype
        self.rotation = None if model.posenc == "abs" else (model.rotation_cos.to(self.dtype), model.rotation_sin.to(self.dtype))
        self.modulations = Modulations(model, timesteps)
        self.blocks = nn.ModuleList([InferenceBlock(block, linear) for block in model.blocks])
        self.last, self.eps = linear(model.final_layer.linear), model.final_layer.norm_final.eps
        self.compiled = Compiled(self.denoise, self.modulations.weight.device, self.dtype) if compile else None

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        modulations = self.modulations(t, y)
        return self.compiled(x, modulations) if self.compiled else self.denoise(x, modulations)

    def denoise(self, x: Tensor, modulations: Tensor) -> Tensor:
        """All that depends on x: latents (N, C, H, W), modulations (N, 6 * depth + 2, D) -> the model's output."""
        h = self.x_embedder(x.to(self.dtype)).contiguous()  # (N, T, D)
        if self.pos_embed is not None:
            h += self.pos_embed
        vectors = modulations.unsqueeze(2).unbind(1)  # each (N, 1, D)
        for k, block in enumerate(self.blocks):
            h = block(h, vectors[6 * k : 6 * k + 6], self.rotation)
        h = self.last(modulated_norm(h, *vectors[-2:], self.eps))
        return unpatchify(h, self.patch_size, self.out_channels)[:, : self.returned_channels].to(x.dtype)


def prepare_for_inference(model: DiT, timesteps: Sequence[float] = (), compile: bool = False) -> InferenceDiT:
    """Make a model fast to call. Its weights are copied where they are packed, so let go of `model` where memory counts.

    Args:
        model: a DiT or SiT in eval mode, on its device, in its number type (`model.bfloat16()`, `model.half()`).
        timesteps: the times that will be walked, as the model will be told them, such as `solver.timesteps`: their modulations are kept. Any other time
            works too, and is computed when it comes.
        compile: hand it to torch.compile, see `tstitch.compiled.Compiled`.

    Returns:
        The same function: float32 to 2e-6 of its values, narrower types to their rounding.
    """
    return InferenceDiT(model, timesteps, compile)
