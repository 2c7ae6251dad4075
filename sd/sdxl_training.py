"""What the small U-Net of SDXL learns: the timesteps that it will own and no others, from the data and, if asked for, from the large U-Net.

Time runs from T - 1 (noise) to 0 (data). At ratio r the small model owns t in [(1 - r) T, T). A curriculum widens r over the training: it begins with the
noisiest part, where the two models agree soonest.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from sd.sdxl_data import Batch, EncodedPictures, Text, draw_bucket_batch
from sd.tstitch_sd_utils import check_fit, load_part, local_folder, read_part, scheduler_config, stitch, unstitch
from tstitch.autoencoder import to_uint8
from tstitch.errors import InputError
from tstitch.plots import contact_sheet, save_image
from tstitch.schedule import StitchSchedule, steps_by_denoiser
from tstitch.training import JsonLines, snr_weights


def load_frozen(source: str, variant: str | None = None) -> StableDiffusionXLPipeline:
    """An SDXL pipeline in float32, without its U-Net, from a hub name or a folder.

    Raises:
        InputError: if it is neither here nor to be had from the hub.
    """
    pipe = read_part(StableDiffusionXLPipeline, source, variant=variant, torch_dtype=torch.float32, unet=None, add_watermarker=False)
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False).eval()
    return pipe


def load_large(source: str, dtype: torch.dtype, variant: str | None = None) -> UNet2DConditionModel:
    """The U-Net of a pipeline, frozen."""
    return read_part(UNet2DConditionModel, source, subfolder="unet", variant=variant, torch_dtype=dtype).requires_grad_(False).eval()


def load_small(source: str, large: str, pipe: StableDiffusionXLPipeline) -> UNet2DConditionModel:
    """The U-Net to train, in float32; its own folder or hub name, or a pipeline's.

    Raises:
        InputError: besides, if it does not fit the U-Net of `large`, whose weights are not needed for that.
    """
    config = load_part("large U-Net of", large, UNet2DConditionModel.load_config, local_folder(large) or large, subfolder="unet")
    unet = read_part(UNet2DConditionModel, source, subfolder="unet", torch_dtype=torch.float32)
    check_fit(SimpleNamespace(unet=SimpleNamespace(config=config), scheduler=pipe.scheduler), unet, scheduler_config(source, None))
    return unet.train().requires_grad_(True)


def save_unet(folder: Path, unet: UNet2DConditionModel) -> None:
    """Write a U-Net in diffusers format, in place of one that may be there; a kill leaves the old one or none, never a half."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    unet.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def training_scheduler(pipe: StableDiffusionXLPipeline) -> DDPMScheduler:
    """The pipeline's noise at every training timestep, whatever its sampler is."""
    return DDPMScheduler.from_config(pipe.scheduler.config)


@dataclass(frozen=True)
class Curriculum:
    """The small model's share while it trains: from `start` at step 0 linearly to `ratio` at step num_steps - 1, `ratio` from then on.

    Raises:
        InputError: unless 0 < start <= ratio <= 1.
    """

    ratio: float
    start: float
    num_steps: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise InputError(f"--ratio must be above 0 and at most 1, got {self.ratio:g}")
        if not 0 < self.start <= self.ratio:
            raise InputError(f"--ratio_start must be above 0 and at most --ratio {self.ratio:g}, got {self.start:g}")

    def ratio_at(self, step: int) -> float:
        """Share in (0, 1] at step 0, 1, ..."""
        if step >= self.num_steps - 1:
            return self.ratio
        return self.start + (self.ratio - self.start) * step / (self.num_steps - 1)

    def first_timestep(self, step: int, num_timesteps: int) -> int:
        """Smallest timestep that is drawn at a step; all from there to num_timesteps - 1 are."""
        return num_timesteps - max(1, _owned(self.ratio_at(step), num_timesteps))


@lru_cache
def _owned(ratio: float, num_timesteps: int) -> int:
    return steps_by_denoiser(StitchSchedule.from_ratio(ratio).legs(num_timesteps), 2)[0]


def loss_weights(scheduler: DDPMScheduler, gamma: float | None) -> Tensor:
    """Weight (T,) of the squared error at each timestep; all ones without gamma.

    Hang et al. 2023, arXiv:2303.09556: min(SNR, gamma) / SNR for noise, min(SNR, gamma) / (SNR + 1) for the velocity.

    Raises:
        InputError: if the models predict something else.
    """
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise InputError(f"the pipeline's scheduler has prediction_type '{kind}'; this trainer knows epsilon and v_prediction")
    alphas_cumprod = scheduler.alphas_cumprod.double().numpy()
    if gamma is None or kind == "epsilon":
        return snr_weights(alphas_cumprod, gamma)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return torch.from_numpy(np.minimum(snr, gamma) / (snr + 1)).float()


def predict(unet: nn.Module, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
    """Answer of an SDXL U-Net to noisy latents x_t (n, C, h, w) at timesteps t (n,) under the batch's conditions."""
    added = {"text_embeds": batch.text.pooled, "time_ids": batch.time_ids}
    return unet(x_t, t, encoder_hidden_states=batch.text.embeds, added_cond_kwargs=added).sample


def stitch_losses(
    small: nn.Module, batch: Batch, t: Tensor, noise: Tensor, *, scheduler: DDPMScheduler, weights: Tensor, large: UNet2DConditionModel | None = None,
    distill_weight: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """Scalars "mse" against the noise or the velocity, "distill" against the large model's answer to the same, and "loss", mse + distill_weight * distill.

    Args:
        t: (n,) timesteps.
        noise: (n, C, h, w), unit variance.
        weights: (T,), for both terms; from `loss_weights`.
        large: frozen, in any number type; None for no distillation.
    """
    x_t = scheduler.add_noise(batch.latents, noise, t)
    target = noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(batch.latents, noise, t)
    answer = predict(small, x_t, t, batch).float()

    def error(wanted: Tensor) -> Tensor:
        return (weights[t] * (answer - wanted.float()).square().mean(dim=(1, 2, 3))).mean()

    mse = error(target)
    if large is None:
        return {"loss": mse, "mse": mse}
    with torch.no_grad():
        text = Text(*(part.to(large.dtype) for part in batch.text))
        wanted = predict(large, x_t.to(large.dtype), t, batch._replace(text=text))
    distill = error(wanted)
    return {"loss": mse + distill_weight * distill, "mse": mse, "distill": distill}


class StitchTraining:
    """The losses of each part of each step, as `tstitch.training.fit` asks for them.

    Args:
        size: items of a part.
        num_parts: parts of a step.
        empty_prompts: share of captions that are left out, for guidance.
        record: file that gets a line for each part of this process: step (from 1), part, ratio, the smallest timestep allowed, the timesteps drawn; or None.
    """

    def __init__(
        self, data: EncodedPictures, curriculum: Curriculum, scheduler: DDPMScheduler, *, size: int, num_parts: int, seed: int, device: torch.device,
        record: Path | None, large: UNet2DConditionModel | None = None, distill_weight: float = 1.0, snr_gamma: float | None = None, empty_prompts: float = 0.0,
    ) -> None:  # fmt: skip
        self.data, self.curriculum, self.scheduler, self.large = data, curriculum, scheduler, large
        self.size, self.num_parts, self.seed, self.device, self.record = size, num_parts, seed, device, record
        self.distill_weight, self.empty_prompts = distill_weight, empty_prompts
        self.weights = loss_weights(scheduler, snr_gamma).to(device)
        self._log: JsonLines | None = None

    def __call__(self, model: nn.Module, step: int, part: int) -> dict[str, Tensor]:
        """Draw a batch and its timesteps, and compare."""
        items = draw_bucket_batch(self.data.bucket_of, step=step, part=part, num_parts=self.num_parts, size=self.size, seed=self.seed)
        num_timesteps = self.scheduler.config.num_train_timesteps
        first = self.curriculum.first_timestep(step, num_timesteps)
        t = torch.randint(first, num_timesteps, (self.size,))
        batch = self.data.batch(items, torch.rand(self.size) < self.empty_prompts, self.device)
        noise = torch.randn(batch.latents.shape).to(self.device)
        ratio = self.curriculum.ratio_at(step)
        if self._log is None and self.record is not None:  # now that the step is known at which a resumed run goes on
            self._log = JsonLines(self.record, step)
        if self._log is not None:
            self._log.write({"step": step + 1, "part": part, "ratio": ratio, "first": first, "timesteps": t.tolist()})
        terms = stitch_losses(
            model, batch, t.to(self.device), noise, scheduler=self.scheduler, weights=self.weights, large=self.large, distill_weight=self.distill_weight
        )  # fmt: skip
        return terms | {"ratio": torch.tensor(ratio, device=self.device)}


class Previews:
    """Called as previews(small U-Net, steps done): writes folder/{step:07d}.png, stitched at the ratio that the last step trained.

    Args:
        pipe: with the large U-Net, the VAE and a scheduler; the text encoders are not asked.
        prompts: (n, ...), encoded.
        null: (n, ...), what guidance starts from.
        size: height and width in pixels.
        seed: picture i starts from the noise of seed + i.
    """

    def __init__(
        self, pipe: StableDiffusionXLPipeline, prompts: Text, null: Text, curriculum: Curriculum, folder: Path, accelerator: Accelerator, *, size: int,
        num_steps: int, guidance_scale: float, seed: int,
    ) -> None:  # fmt: skip
        self.pipe, self.prompts, self.null, self.curriculum, self.folder, self.accelerator = pipe, prompts, null, curriculum, folder, accelerator
        self.size, self.num_steps, self.guidance_scale, self.seed = size, num_steps, guidance_scale, seed
        pipe.set_progress_bar_config(desc="validation", leave=False, disable=not accelerator.is_main_process)

    @torch.no_grad()
    def __call__(self, small: UNet2DConditionModel, step: int) -> dict[str, float]:
        """Draw; gives no numbers."""
        ratio = self.curriculum.ratio_at(step - 1)
        images = to_uint8(self._sample(small, ratio)).cpu()  # by every process: a sharded model needs them all
        if self.accelerator.is_main_process:
            save_image(self.folder / f"{step:07d}.png", contact_sheet(images, f"step {step}, ratio {ratio:.2f}"))
            for tracker in self.accelerator.trackers:
                tracker.log_images({"validation": images.permute(0, 2, 3, 1).numpy()}, step=step, dataformats="NHWC")
        return {}

    def _sample(self, small: UNet2DConditionModel, ratio: float) -> Tensor:
        dtype, device = self.pipe.unet.dtype, self.accelerator.device
        (embeds, pooled), (null_embeds, null_pooled) = ([part.to(device, dtype) for part in text] for text in (self.prompts, self.null))
        stitch(self.pipe, _twin(small, dtype))
        try:
            latents = self.pipe(
                prompt_embeds=embeds, pooled_prompt_embeds=pooled, negative_prompt_embeds=null_embeds, negative_pooled_prompt_embeds=null_pooled,
                unet_s_ratio=ratio, num_inference_steps=self.num_steps, guidance_scale=self.guidance_scale, height=self.size, width=self.size,
                generator=[torch.Generator().manual_seed(self.seed + k) for k in range(len(embeds))], output_type="latent",
            ).images  # fmt: skip
        finally:
            unstitch(self.pipe)
        vae = self.pipe.vae
        # One at a time, in the VAE's own number type: SDXL's overflows in half precision.
        return torch.cat([vae.decode(one[None].to(vae.dtype) / vae.config.scaling_factor).sample for one in latents])


def _twin(unet: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """A copy in another number type: `stitch` gives a U-Net the large one's, and a U-Net in training keeps its own."""
    with torch.device("meta"):
        twin = UNet2DConditionModel.from_config(unet.config)
    twin.load_state_dict({name: value.to(dtype, copy=True) for name, value in unet.state_dict().items()}, assign=True)
    return twin.eval()
