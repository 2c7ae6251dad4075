"""The diffusion transformer: Peebles and Xie 2022, "Scalable Diffusion Models with Transformers", arXiv:2212.09748.

State-dict keys are the published ones, so published weights load with strict=True. `posenc="rope"` and `"gta"` rotate features by their token's row
and column (Su et al. 2021, arXiv:2104.09864; Miyato et al. 2023, "GTA", arXiv:2310.10375).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tstitch.checkpoints import load_strict
from tstitch.checkpoints.convert import Published
from tstitch.checkpoints.layouts import SIZES
from tstitch.errors import InputError
from tstitch.guidance import ClassifierFreeGuidance

POSITION_ENCODINGS = ("abs", "rope", "gta")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """X * (1 + scale) + shift, for x (N, T, D) and shift, scale (N, D)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def sincos_position_embedding(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding, float32 (1, grid * grid, width), tokens row by row.

    The first half of the features encodes the column, the second the row; each is [sin, cos] of position * 10000 ** (-i / (width / 4)).
    """
    if width % 4:
        raise InputError(f"hidden size {width} must be divisible by 4 for the position embedding")
    position = torch.arange(grid, dtype=torch.float64)
    frequency = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = position[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, width / 2)
    columns, rows = axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)


def rotation_angles(head_dim: int, grid: int) -> Tensor:
    """Angle of each feature pair at each token, float32 (grid * grid, head_dim / 2).

    Pair 2f turns by row * 10000 ** (-f / F), pair 2f + 1 by column * 10000 ** (-f / F), F = head_dim / 4.
    """
    if head_dim % 4:
        raise InputError(f"head size {head_dim} must be divisible by 4 for rotary position encodings")
    frequency = 10000 ** (-torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    coordinates = torch.stack([rows.flatten(), columns.flatten()], dim=1)  # (T, 2)
    return (frequency[None, :, None] * coordinates[:, None, :]).flatten(1).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent feature pairs of x (..., T, d) by angles with the given cos and sin (T, d / 2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, each (N, heads, T, d).

    On a CPU in bfloat16 the fused kernel is slower than three plain products at these lengths (T = 64, forward and backward: 4 times).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= 256:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return scores.softmax(dim=-1).to(v.dtype) @ v  # the kernel sums in float32, and autocast has it answer so
    return F.scaled_dot_product_attention(q, k, v)


class RMSNorm(nn.Module):
    """scale * x / (rms(x) + 1e-8) over the last dimension; the epsilon stands outside the root, as published."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        rms = x.float().square().mean(dim=-1, keepdim=True).sqrt() + 1e-8
        return self.scale * (x.float() / rms).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over tokens, with optional q/k normalisation and rotary encodings."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, posenc: str) -> None:
        super().__init__()
        if dim % num_heads:
            raise InputError(f"hidden size {dim} is not divisible by {num_heads} heads")
        self.num_heads, self.posenc = num_heads, posenc
        self.qkv = nn.Linear(dim, 3 * dim)
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(dim // num_heads), RMSNorm(dim // num_heads)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (N, T, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (N, heads, T, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            cos, sin = rotation
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if self.posenc == "gta":
                v = rotate(v, cos, sin)
        # Under autocast, norm and rotation answer in float32; the products shall be those of autocast's type.
        out = attend(*(x.to(qkv.dtype) for x in (q, k, v)))  # (N, heads, T, d)
        if rotation is not None and self.posenc == "gta":
            out = rotate(out, cos, -sin)  # back into the frame of the query's token
        return self.proj(out.transpose(1, 2).flatten(2))  # (N, T, D)


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, posenc: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads, qk_norm, posenc)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = torch.addcmul(x, gate_a.unsqueeze(1), self.attn(modulate(self.norm1(x), shift_a, scale_a), rotation))
        return torch.addcmul(x, gate_m.unsqueeze(1), self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


class PatchEmbed(nn.Module):
    """Cut into patches and project: (N, C, H, W) -> (N, T, D), tokens row by row."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timesteps (N,) -> (N, D): 128 cosines, then 128 sines, of t * 10000 ** (-i / 128), then an MLP."""

    features = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.features // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t.float()[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels (N,) -> (N, D). In training a label becomes the null label, the table's last row, with probability `dropout`."""

    def __init__(self, num_classes: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), dim)
        self.num_classes, self.dropout = num_classes, dropout

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            y = torch.where(torch.rand(y.shape, device=y.device) < self.dropout, self.num_classes, y)
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    """Modulated norm and projection to the pixels of a patch."""

    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def unpatchify(x: Tensor, patch_size: int, channels: int) -> Tensor:
    """Put patches back: (N, T, p * p * C) -> (N, C, H, W); within a token the channel runs fastest."""
    p, grid = patch_size, math.isqrt(x.shape[1])
    x = x.view(len(x), grid, grid, p, p, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), channels, grid * p, grid * p)


class DiT(nn.Module):
    """Class-conditional denoiser of latents.

    Args:
        input_size: height and width of the latents, divisible by patch_size (32 for 256x256 pixels behind an 8x VAE).
        class_dropout_prob: share of labels replaced by the null label in training; 0 means there is no null label.
        learn_sigma: predict the variance too, in a second half of output channels.
        posenc: "abs" adds a fixed sine-cosine embedding; "rope" rotates q and k; "gta" rotates q, k, v and turns the output back.
        qk_norm: RMSNorm on q and k. None: as published, True for rope and gta, False for abs.

    Raises:
        InputError: if sizes do not divide or posenc is unknown.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        posenc: str = "abs",
        qk_norm: bool | None = None,
    ) -> None:
        super().__init__()
        if posenc not in POSITION_ENCODINGS:
            raise InputError(f"unknown posenc '{posenc}'; choose from {', '.join(POSITION_ENCODINGS)}")
        if input_size % patch_size:
            raise InputError(f"latents of size {input_size} cannot be cut into patches of {patch_size}; choose a multiple")
        qk_norm = posenc != "abs" if qk_norm is None else qk_norm
        self.config = {
            "input_size": input_size, "patch_size": patch_size, "in_channels": in_channels, "hidden_size": hidden_size, "depth": depth,
            "num_heads": num_heads, "mlp_ratio": mlp_ratio, "class_dropout_prob": class_dropout_prob, "num_classes": num_classes,
            "learn_sigma": learn_sigma, "posenc": posenc, "qk_norm": qk_norm,
        }  # fmt: skip
        self.in_channels, self.patch_size, self.num_classes = in_channels, patch_size, num_classes
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.returned_channels = self.out_channels  # of what the last layer makes
        self.posenc = posenc
        self.latent_shape = (in_channels, input_size, input_size)
        self.gradient_checkpointing = False  # True: training keeps no activations inside blocks and computes them again, 1/3 more work for much less memory
        grid = input_size // patch_size

        if posenc == "abs":
            # In the state dict, but not trained.
            self.pos_embed = nn.Parameter(sincos_position_embedding(hidden_size, grid), requires_grad=False)
        else:
            self.pos_embed = None
            angles = rotation_angles(hidden_size // num_heads, grid)
            self.register_buffer("rotation_cos", angles.cos(), persistent=False)
            self.register_buffer("rotation_sin", angles.sin(), persistent=False)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm, posenc) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialize()

    @classmethod
    def from_published(cls, published: Published, source: object) -> DiT:
        """Build the model that a checkpoint holds, in eval mode, float32; `source` names the file in errors.

        Raises:
            InputError: if the checkpoint's configuration is not that of a DiT.
        """
        try:
            model = cls(**published.config)
        except TypeError:
            raise InputError(f"{source} is not a DiT: its header has {', '.join(sorted(published.config))}; pass a file that train.py exported") from None
        load_strict(model, published.state, source)
        return model.eval()

    def _initialize(self) -> None:
        """Xavier everywhere, and zeros where the block should begin as the identity: an untrained model answers exactly 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        zeros = [block.adaLN_modulation[-1] for block in self.blocks] + [self.final_layer.adaLN_modulation[-1], self.final_layer.linear]
        for layer in zeros:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Put patches back: (N, T, p * p * C) -> (N, C, H, W)."""
        return unpatchify(x, self.patch_size, self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict eps (and the variance values) for noisy latents.

        Args:
            x: latents (N, C, H, W); computed in the type of the weights, returned in the type of x.
            t: training timesteps (N,), 0..999, any number type.
            y: labels (N,), 0..num_classes, where num_classes is the null label.

        Returns:
            (N, C, H, W), or (N, 2C, H, W) with learn_sigma.
        """
        dtype = self.x_embedder.proj.weight.dtype
        h = self.x_embedder(x.to(dtype))  # (N, T, D)
        rotation = None
        if self.pos_embed is not None:
            h = h + self.pos_embed
        else:
            rotation = (self.rotation_cos.to(dtype), self.rotation_sin.to(dtype))  # (T, d / 2)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        recompute = self.gradient_checkpointing and self.training
        for block in self.blocks:
            h = checkpoint(block, h, c, rotation, use_reentrant=False) if recompute else block(h, c, rotation)  # (N, T, D)
        h = self.final_layer(h, c)  # (N, T, p * p * C_out)
        return self.unpatchify(h).to(x.dtype)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Guided prediction with the published calling convention.

        Args:
            x: (2N, C, H, W); only the first half is read.
            t: (2N,).
            y: (2N,), N labels, then N null labels.

        Returns:
            (2N, C_out, H, W): the first 3 channels are guided and equal in both halves, the others are each half's own.
        """
        n = len(x) // 2
        out = self(torch.cat([x[:n], x[:n]]), t, y)
        guided = ClassifierFreeGuidance(cfg_scale, self.num_classes).combine(out[:n], out[n:], self.in_channels)
        return torch.cat([guided, torch.cat([guided[:, :3], out[n:, 3:]], dim=1)])


DiT_models: dict[str, Callable[..., DiT]] = {
    f"DiT-{name}/{patch}": partial(DiT, depth=depth, hidden_size=width, patch_size=patch, num_heads=heads)
    for name, (depth, width, heads) in reversed(SIZES.items())
    for patch in (2, 4, 8)
}
