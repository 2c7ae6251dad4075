"""Training a first stage with Lightning: pictures through a codebook (VQ) or a Gaussian bottleneck (KL) and back.

    nll  = pixelloss_weight |x - x_hat| + perceptual_weight LPIPS(x, x_hat)
    loss = nll + codebook_weight codebook     (VQ, means over pixels)
    loss = nll + kl_weight KL                 (KL, sums over a picture, which is why its kl_weight is small)

From step disc_start on a discriminator D of patches learns to tell reconstructions from pictures by the hinge loss, and the loss gets disc_weight w g with
g = -mean D(x_hat) and w = |d nll / d L| / (|d g / d L| + 1e-4), at most 1e4, L the decoder's last layer: Esser et al. 2021, arXiv:2012.09841, Eqs. 6 and 7.
Both sides learn from one backward pass and one optimizer, each from a loss that cannot reach the other's weights; so accumulation, clipping, number types
and resuming are Lightning's own, and a step is a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import relu

from tstitch.torchvision_compat import prepare_torchvision

prepare_torchvision()  # diffusers and Lightning import it where it is installed
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ldm.checkpoints import compvis_state_dict, load_compvis, read_ldm_first_stage
from ldm.config import AutoencoderConfig
from ldm.data import Batch
from ldm.networks import build_ldm_first_stage
from ldm.training import CompVisModule
from tstitch.checkpoints import load_strict, save_weights
from tstitch.errors import InputError

_DISCRIMINATOR = "loss.discriminator."  # CompVis' name of it in a checkpoint


class PatchDiscriminator(nn.Module):
    """How real each patch of pictures (N, C, H, W) looks: logits (N, 1, h, w). Isola et al. 2017, arXiv:1611.07004, section 3.2.2.

    Args:
        width: channels of the first layer.
        num_layers: layers that halve the size, 3 for patches of 70x70 pixels.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**k, 8) for k in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for k in range(num_layers):
            stride = 2 if k + 1 < num_layers else 1
            layers += [nn.Conv2d(widths[k], widths[k + 1], 4, stride, 1, bias=False), nn.BatchNorm2d(widths[k + 1]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of patches, float32."""
        return self.main(x).float()

    def frozen(self, x: Tensor) -> Tensor:
        """Logits whose gradients reach x and not the weights."""
        return functional_call(self, {name: parameter.detach() for name, parameter in self.named_parameters()}, (x,))


class FirstStageLoss(nn.Module):
    """The loss of a first stage, with its discriminator and its perceptual network where their weights are not 0.

    Args:
        kind: "vq" or "kl".
        weights: `loss` of the configuration.
        image_size: height of the pictures.

    Raises:
        InputError: if the perceptual network's weights are not there, or the pictures too small for the discriminator.
    """

    def __init__(self, kind: str, weights: Mapping[str, Any], image_size: int) -> None:
        super().__init__()
        self.kind, self.weights = kind, weights
        self.disc_weight = weights["disc_weight"] * weights["disc_factor"]
        self.perceptual = load_perceptual() if weights["perceptual_weight"] else None
        self.discriminator = None
        if self.disc_weight:
            layers = weights["disc_num_layers"]
            if image_size < 3 * 2**layers:
                raise InputError(f"pictures of {image_size} pixels are too small for disc_num_layers {layers}; lower it, or set disc_weight to 0")
            self.discriminator = PatchDiscriminator(weights["disc_in_channels"], weights["disc_ndf"], layers)

    def reconstruction(self, x: Tensor, x_hat: Tensor, bottleneck: Tensor) -> dict[str, Tensor]:
        """The loss without discriminator, and its parts.

        Args:
            x: pictures in [-1, 1], (N, 3, H, W).
            x_hat: reconstructions, likewise.
            bottleneck: codebook loss, a scalar, or KL of each picture (N,).

        Returns:
            loss, nll, rec_loss (mean absolute error of a number), bottleneck, and perceptual where it counts; scalars.
        """
        error = self.weights["pixelloss_weight"] * (x - x_hat).abs()
        terms = {"rec_loss": (x - x_hat).abs().mean()}
        if self.perceptual is not None:
            distance = self.perceptual(x.contiguous(), x_hat.contiguous()).view(-1, 1, 1, 1)
            error, terms["perceptual"] = error + self.weights["perceptual_weight"] * distance, distance.mean()
        nll = error.mean() if self.kind == "vq" else error.sum() / len(x)
        terms["bottleneck"] = bottleneck.mean()
        weight = self.weights["codebook_weight" if self.kind == "vq" else "kl_weight"]
        return {"loss": nll + weight * terms["bottleneck"], "nll": nll, **terms}

    def adversarial(self, x: Tensor, x_hat: Tensor, nll: Tensor, last_layer: Tensor) -> dict[str, Tensor]:
        """What the discriminator adds to the loss: generator and discriminator together, and their parts.

        Args:
            last_layer: the decoder's last weights, which nll depends on.

        Returns:
            added, d_weight (w), g_loss (g), disc_loss; scalars.
        """
        g_loss = -self.discriminator.frozen(x_hat).mean()
        of_nll, of_g = (torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm() for term in (nll, g_loss))
        balance = (of_nll / (of_g + 1e-4)).clamp(0, 1e4).detach()
        real, fake = self.discriminator(x), self.discriminator(x_hat.detach())
        disc_loss = 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())
        added = self.disc_weight * balance * g_loss + self.weights["disc_factor"] * disc_loss
        return {"added": added, "d_weight": balance, "g_loss": g_loss, "disc_loss": disc_loss}

    def silent(self, like: Tensor) -> dict[str, Tensor]:
        """What `adversarial` returns before disc_start: zeros, to which every weight of the discriminator still belongs, as several devices ask for."""
        zero = like.new_zeros(())
        added = sum((parameter.sum() for parameter in self.discriminator.parameters()), zero) * 0
        return {"added": added, "d_weight": zero, "g_loss": zero, "disc_loss": zero}


def load_perceptual() -> nn.Module:
    """LPIPS on VGG-16 (Zhang et al. 2018, arXiv:1801.03924), frozen: two batches in [-1, 1] -> distance of each pair.

    Raises:
        InputError: if VGG's weights are not there. They are not fetched while a run starts, which may have no network.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
    if not weights.exists():
        raise InputError(
            f"perceptual_weight needs VGG's weights at {weights}; fetch https://download.pytorch.org/models/{weights.name} to there, "
            "or pass model.params.lossconfig.params.perceptual_weight=0"
        )
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity("vgg").net.requires_grad_(False)
    except ModuleNotFoundError as error:
        raise InputError(f"perceptual_weight needs {error.name}; install torchvision, or set it to 0") from None


class FirstStageTraining(CompVisModule):
    """A VQModel or AutoencoderKL in training.

    Args:
        config: the network and its loss.
        learning_rate: peak; of encoder and decoder it is multiplied by lr_g_factor.

    Raises:
        InputError: as `build_ldm_first_stage` and `FirstStageLoss`.
    """

    def __init__(self, config: AutoencoderConfig, learning_rate: float) -> None:
        super().__init__(config.training, learning_rate, ("rec_loss", "nll", "bottleneck", "perceptual")[: 3 + bool(config.loss["perceptual_weight"])])
        self.config = config
        self.network = build_ldm_first_stage(config.params, config.kind)
        self.average = self.average_of(self.network)
        self.loss = FirstStageLoss(config.kind, config.loss, self.network.config.sample_size)

    @property
    def averaged(self) -> nn.Module:
        """The network with the moving average, where there is one."""
        return self.network if self.average is None else self.average

    def judge(self) -> list[tuple[str, nn.Module]]:
        """See `CompVisModule`."""
        return [("", self.network)] + [("_ema", self.averaged)] * (self.average is not None)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Encoder, codebook and decoder; the discriminator."""
        groups = [{"params": list(self.network.parameters()), "lr": self.learning_rate * self.said["lr_g_factor"]}]
        if self.loss.discriminator is not None:
            groups.append({"params": list(self.loss.discriminator.parameters())})
        return groups

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None, gradient_clip_algorithm: str | None) -> None:
        """Clip the two sides apart: the discriminator's gradients say nothing of the decoder's."""
        if gradient_clip_val is None:
            return
        clip = nn.utils.clip_grad_value_ if str(gradient_clip_algorithm).endswith("value") else nn.utils.clip_grad_norm_
        for group in optimizer.param_groups:
            clip(group["params"], gradient_clip_val)

    def reconstruct(self, model: nn.Module, x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Reconstructions like x, and the codebook loss or the KL of each picture; with a seed KL latents are drawn, else they are the mean."""
        if self.config.kind == "vq":
            decoded = model.decode(model.encode(x).latents)
            # Commitment has weight 1, the codebook 0.25: diffusers' default, and the published first stages'.
            return decoded.sample.float(), decoded.commit_loss
        posterior = DiagonalGaussianDistribution(model.encode(x).latent_dist.parameters.float())  # sums of half precision would be coarse
        z = posterior.mean
        if seed is not None:
            z = z + posterior.std * torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z)
        return model.decode(z).sample.float(), posterior.kl()

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Terms without discriminator."""
        x, _, seed = batch
        return self.loss.reconstruction(x, *self.reconstruct(model, x, seed))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Loss of a part, and what `ldm.callbacks.LossLog` writes."""
        x, _, seed = batch
        x_hat, bottleneck = self.reconstruct(self.network, x, seed)
        terms = self.loss.reconstruction(x, x_hat, bottleneck)
        loss = terms["loss"]
        if self.loss.discriminator is not None:
            if self.steps_done >= self.config.loss["disc_start"]:
                more = self.loss.adversarial(x, x_hat, terms["nll"], self.network.decoder.conv_out.weight)
            else:
                more = self.loss.silent(loss)
            loss = loss + more.pop("added")
            terms |= more
        self.log("loss", terms["rec_loss"].detach(), prog_bar=True, logger=False)
        return {"loss": loss, "terms": {name: value.detach() for name, value in terms.items()}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write CompVis' names; the moving average goes under "ema", where `tstitch.checkpoints` looks for it first."""
        state = compvis_state_dict(self.network)
        if self.loss.discriminator is not None:
            state |= {_DISCRIMINATOR + name: value for name, value in self.loss.discriminator.state_dict().items()}
        checkpoint["state_dict"] = state
        if self.average is not None:
            checkpoint["ema"] = compvis_state_dict(self.average)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read CompVis' names."""
        state, source = checkpoint["state_dict"], "the checkpoint"
        load_compvis(self.network, {name: value for name, value in state.items() if not name.startswith("loss.")}, source).train()
        if self.average is not None:
            load_compvis(self.average, checkpoint.get("ema", state), source)
        if self.loss.discriminator is not None:
            own = {name.removeprefix(_DISCRIMINATOR): value for name, value in state.items() if name.startswith(_DISCRIMINATOR)}
            load_strict(self.loss.discriminator, own, source)
        checkpoint["state_dict"] = self.state_dict()  # what Lightning itself loads next

    def load_from(self, path: Path) -> None:
        """See `CompVisModule`; the discriminator begins anew."""
        state = read_ldm_first_stage(path)
        for model in filter(None, (self.network, self.average)):
            load_compvis(model, state, path).train()

    def export(self, path: Path) -> None:
        """See `CompVisModule`; kind and `params` in the header."""
        save_weights(path, compvis_state_dict(self.averaged), {"kind": self.config.kind, "first_stage": dict(self.config.params)})
