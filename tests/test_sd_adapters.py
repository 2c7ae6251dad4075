"""LoRAs and IP-Adapters on stitched pipelines: which U-Net they change, and that they come off again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from sd_tiny import draw, load, save_tiny_pair, small_xl, tiny_sd, tiny_unet
from torch import Tensor

from sd.tstitch_sd_utils import get_tstitch_pipepline_sdxl, get_tstitch_pipepline_sdxl_lcm_lora
from tstitch.errors import InputError


def lora(folder: Path, unet: UNet2DConditionModel, kind: type[DiffusionPipeline] = StableDiffusionPipeline) -> str:
    """Write a random LoRA of a U-Net."""
    peft = pytest.importorskip("peft")
    adapted = copy.deepcopy(unet)
    adapted.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    kind.save_lora_weights(folder, unet_lora_layers=peft.get_peft_model_state_dict(adapted))
    return str(folder)


def test_a_lora_goes_to_the_large_u_net_and_comes_off_again(pipe, tmp_path):
    before = {ratio: draw(pipe, unet_s_ratio=ratio) for ratio in (0, 0.5, 1)}
    pipe.load_lora_weights(lora(tmp_path, tiny_unet()), adapter_name="style")
    with_lora = {ratio: draw(pipe, unet_s_ratio=ratio) for ratio in (0, 0.5, 1)}
    assert not torch.equal(with_lora[0], before[0])
    assert not torch.equal(with_lora[0.5], before[0.5])
    assert torch.equal(with_lora[1], before[1])
    unstitched = tiny_sd()
    unstitched.load_lora_weights(str(tmp_path), adapter_name="style")
    assert torch.equal(draw(unstitched), with_lora[0])
    pipe.set_adapters(["style"], [0.5])
    assert pipe.get_active_adapters() == ["style"]
    half = draw(pipe, unet_s_ratio=0)
    assert not torch.equal(half, with_lora[0])
    assert torch.equal(half, draw(pipe, unet_s_ratio=0))
    pipe.fuse_lora(components=["unet"])
    torch.testing.assert_close(draw(pipe, unet_s_ratio=0), half, atol=1e-3, rtol=1e-3)
    pipe.unfuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe, unet_s_ratio=0), before[0], atol=1e-4, rtol=1e-4)


def test_an_ip_adapter_acts_on_the_steps_of_the_large_u_net(pipe):
    before = {ratio: draw(pipe, unet_s_ratio=ratio) for ratio in (0, 1)}
    generator = torch.Generator().manual_seed(0)
    crossed = [name for name in pipe.unet.attn_processors if "attn2" in name]
    widths = [pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in crossed]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 4

    adapter = {
        "image_proj": {"proj.weight": random(4 * 32, 24), "proj.bias": random(4 * 32), "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)},
        "ip_adapter": {f"{2 * k + 1}.{kind}.weight": random(width, 32) for k, width in enumerate(widths) for kind in ("to_k_ip", "to_v_ip")},
    }
    pipe.load_ip_adapter(adapter, subfolder="", weight_name="", image_encoder_folder=None)
    picture = {"ip_adapter_image_embeds": [random(2, 1, 24)]}
    with_adapter = {ratio: draw(pipe, unet_s_ratio=ratio, **picture) for ratio in (0, 0.5, 1)}
    assert not torch.equal(with_adapter[0], before[0])
    assert torch.equal(with_adapter[1], before[1])
    unstitched = tiny_sd()
    unstitched.load_ip_adapter(adapter, subfolder="", weight_name="", image_encoder_folder=None)
    assert torch.equal(draw(unstitched, **picture), with_adapter[0])
    pipe.unload_ip_adapter()
    assert torch.equal(draw(pipe, unet_s_ratio=0), before[0])


def test_each_u_net_gets_its_own_lcm_lora_and_the_pipeline_the_lcm_scheduler(tmp_path):
    large, small = save_tiny_pair(tmp_path, xl=True)
    plain = load(get_tstitch_pipepline_sdxl, large, small)
    plain.scheduler = LCMScheduler.from_config(plain.scheduler.config)
    loras = {
        "large_lora": lora(tmp_path / "large-lora", tiny_unet(xl=True), StableDiffusionXLPipeline),
        "small_lora": lora(tmp_path / "small-lora", small_xl(), StableDiffusionXLPipeline),
    }
    pipe = load(get_tstitch_pipepline_sdxl_lcm_lora, large, small, **loras)
    assert isinstance(pipe.scheduler, LCMScheduler)
    for ratio, part in ((0, "large"), (1, "small")):
        latents = draw(pipe, steps=4, guidance_scale=0, unet_s_ratio=ratio)
        assert not torch.equal(latents, draw(plain, steps=4, guidance_scale=0, unet_s_ratio=ratio))
        alone = load(get_tstitch_pipepline_sdxl, large, small)
        alone.scheduler = LCMScheduler.from_config(alone.scheduler.config)
        if part == "small":
            alone.unet.unets[0].load_lora_adapter(load_file(tmp_path / "small-lora" / "pytorch_lora_weights.safetensors"), prefix="unet")
        else:
            alone.load_lora_weights(loras["large_lora"])
        torch.testing.assert_close(latents, draw(alone, steps=4, guidance_scale=0, unet_s_ratio=ratio), atol=1e-3, rtol=1e-3)
    assert not [name for name, _ in pipe.unet.named_parameters() if "lora" in name], "merged"


def test_a_lora_that_a_u_net_cannot_take_is_refused(tmp_path):
    large, small = save_tiny_pair(tmp_path, xl=True)
    loras = {
        "large_lora": lora(tmp_path / "large-lora", tiny_unet(xl=True), StableDiffusionXLPipeline),
        "small_lora": lora(tmp_path / "small-lora", small_xl(), StableDiffusionXLPipeline),
    }
    with pytest.raises(InputError, match="could not load the LoRA .*large-lora"):  # of other widths
        get_tstitch_pipepline_sdxl_lcm_lora(large, small, **loras | {"small_lora": loras["large_lora"]}, device="cpu")
    (tmp_path / "words").mkdir()
    weights = {name.replace("unet.", "text_encoder.", 1): value for name, value in load_file(tmp_path / "small-lora/pytorch_lora_weights.safetensors").items()}
    save_file(weights, tmp_path / "words/pytorch_lora_weights.safetensors")
    with pytest.raises(InputError, match="words has no weights for a U-Net"):
        get_tstitch_pipepline_sdxl_lcm_lora(large, small, **loras | {"small_lora": tmp_path / "words"}, device="cpu")
    with pytest.raises(InputError, match="2 small U-Nets; pass one"):
        get_tstitch_pipepline_sdxl_lcm_lora(large, [small, small], **loras, device="cpu")
