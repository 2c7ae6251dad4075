"""Stitched pipelines to and from disk: what is saved, which loader takes what, and what is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from sd_tiny import BETAS, PICTURE, draw, load, save_tiny_pair, small_sd, tiny_controlnet, tiny_sd, tiny_sdxl, tiny_unet, tiny_vae

from sd import tstitch_sd_utils
from sd.stitched_unet import small_folders
from sd.tstitch_sd_utils import get_tstitch_pipepline, get_tstitch_pipepline_sdxl, get_tstitch_pipepline_sdxl_controlnet, stitch, stitched_unet
from tstitch.errors import InputError
from tstitch.presets import ROOT

TRAINED = BETAS | {"steps_offset": 1}


def test_a_stitched_pipeline_is_saved_for_diffusers_and_for_us(pipe, tmp_path):
    draw(pipe, unet_s_ratio=0.5)
    pipe.save_pretrained(tmp_path / "pair")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pair", safety_checker=None)
    assert type(loaded) is StableDiffusionPipeline
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), draw(pipe, unet_s_ratio=0))
    ours = get_tstitch_pipepline(tmp_path / "pair", device="cpu")
    ours.set_progress_bar_config(disable=True)
    assert torch.equal(draw(ours, unet_s_ratio=0.5), draw(pipe, unet_s_ratio=0.5))


def test_three_u_nets_are_saved_and_read_in_their_order(tmp_path):
    pipe = stitch(tiny_sd(), [small_sd(), tiny_unet(2, width=12)])
    pipe.save_pretrained(tmp_path)
    loaded = get_tstitch_pipepline(tmp_path, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    fractions = [0.5, 0.25, 0.25]
    assert torch.equal(draw(loaded, unet_s_ratio=fractions), draw(pipe, unet_s_ratio=fractions))


def test_a_saved_pipeline_has_the_small_u_nets_of_the_last_one_that_was_saved_there(tmp_path, monkeypatch):
    stitch(tiny_sd(), [small_sd(), tiny_unet(2, width=12)]).save_pretrained(tmp_path / "pair")
    stitch(tiny_sd(), small_sd()).save_pretrained(tmp_path / "pair")
    for name in ("unet_small_old", "unet_small_10"):
        (tmp_path / name).mkdir()
    assert [path.name for path in small_folders(tmp_path / "pair")] == ["unet_small"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(get_tstitch_pipepline("~/pair", device="cpu").unet.unets) == 2


def test_small_u_nets_are_read_in_the_order_of_their_numbers(tmp_path):
    names = ["unet_small", *(f"unet_small_{k}" for k in range(2, 12))]
    for name in [*names, "unet_small_old", "unet_smaller"]:
        (tmp_path / name).mkdir()
    assert [path.name for path in small_folders(tmp_path)] == names


@pytest.mark.parametrize(("get", "xl"), [(get_tstitch_pipepline, False), (get_tstitch_pipepline_sdxl, True)])
def test_a_pair_of_local_folders_is_loaded_and_stitched(tmp_path, get, xl):
    large, small = save_tiny_pair(tmp_path, xl=xl)
    expected = draw(stitch((tiny_sdxl if xl else tiny_sd)(), tiny_unet(1, width=8, xl=xl)), unet_s_ratio=0.5)
    assert torch.equal(draw(load(get, large, small), unet_s_ratio=0.5), expected)
    assert torch.equal(draw(load(get, str(large), str(small / "unet")), unet_s_ratio=0.5), expected), "a folder of the U-Net alone"
    assert torch.equal(draw(load(get, large, small, offload="model"), unet_s_ratio=0.5), expected)
    assert load(get, large, small, dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    without_variant = load(get, large, small, variant="fp16", offload="switch")
    assert torch.equal(draw(without_variant, unet_s_ratio=0.5), expected), "a variant that a model lacks is done without"


def test_the_bundled_emoji_pair_is_found_by_its_name(monkeypatch, tmp_path):
    pair = stitch(tiny_sd(), small_sd())
    monkeypatch.setattr(tstitch_sd_utils, "EMOJI", tmp_path)
    with pytest.raises(InputError, match="no folder .*vae"):
        get_tstitch_pipepline("emoji", device="cpu")
    tiny_vae(7).save_pretrained(tmp_path / "vae")
    pair.save_pretrained(tmp_path / "sd")
    for file in (tmp_path / "sd" / "vae").iterdir():
        file.unlink()
    (tmp_path / "sd" / "vae").rmdir()
    pipe = load(get_tstitch_pipepline, "emoji")
    assert torch.equal(draw(pipe, unet_s_ratio=0.5), draw(pair, unet_s_ratio=0.5))
    assert torch.equal(pipe.vae.decoder.conv_in.weight, tiny_vae(7).decoder.conv_in.weight)


def test_a_controlnet_may_be_a_folder_or_a_model(tmp_path):
    large, small = save_tiny_pair(tmp_path, xl=True)
    tiny_unet(1, xl=True, transformer_layers_per_block=1).save_pretrained(small / "unet")
    controlnet = tiny_controlnet(xl=True)
    controlnet.save_pretrained(tmp_path / "controlnet")
    from_model = load(get_tstitch_pipepline_sdxl_controlnet, large, small, controlnet=controlnet, vae=tiny_vae())
    from_folder = load(get_tstitch_pipepline_sdxl_controlnet, large, small, controlnet=tmp_path / "controlnet")
    latents = draw(from_model, image=PICTURE, unet_s_ratio=0.5)
    assert torch.equal(latents, draw(from_folder, image=PICTURE, unet_s_ratio=0.5))
    assert not torch.equal(latents, draw(from_model, image=PICTURE.rotate(90), unet_s_ratio=0.5))


def test_models_of_the_other_family_are_sent_to_the_right_script(tmp_path):
    large, small = save_tiny_pair(tmp_path)
    with pytest.raises(InputError, match="is a StableDiffusionPipeline, not a StableDiffusionXLPipeline; use sd/sd_demo.py"):
        get_tstitch_pipepline_sdxl(large, small, device="cpu")


def test_a_truncated_text_encoder_is_one_sentence(tmp_path):
    large, small = save_tiny_pair(tmp_path)
    file = large / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="could not load .*large"):
        get_tstitch_pipepline(large, small, device="cpu")


def test_the_correct_spelling_is_the_same_function():
    for name in ("", "_sdxl", "_sdxl_lcm_lora", "_sdxl_controlnet"):
        assert getattr(tstitch_sd_utils, f"get_tstitch_pipeline{name}") is getattr(tstitch_sd_utils, f"get_tstitch_pipepline{name}")


def test_models_that_are_not_to_be_had_are_one_sentence(monkeypatch, tmp_path):
    large, small = save_tiny_pair(tmp_path)
    with pytest.raises(InputError, match="no folder .*nowhere; pass a folder in diffusers format, or a hub name"):
        get_tstitch_pipepline(tmp_path / "nowhere", small, device="cpu")
    with pytest.raises(InputError, match=r"no folder \./nowhere"):
        get_tstitch_pipepline(large, "./nowhere", device="cpu")
    with pytest.raises(InputError, match=f"could not load {small}"):
        get_tstitch_pipepline(small, small, device="cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"could not load t-stitch/no-such-model .*HF_HUB_OFFLINE is set\); unset that, or pass a folder in diffusers"):
        get_tstitch_pipepline("t-stitch/no-such-model", small, device="cpu", cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="could not load t-stitch/no-such-small"):
        get_tstitch_pipepline(large, "t-stitch/no-such-small", device="cpu", cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="unknown offload 'disk'; choose from none, switch, model"):
        get_tstitch_pipepline(large, small, device="cpu", offload="disk")
    with pytest.raises(InputError, match="device 'warp' is not available"):
        get_tstitch_pipepline(large, small, device="warp")
    with pytest.raises(TypeError, match="no argument 'no_such_word'"):
        get_tstitch_pipepline(large, small, device="cpu", no_such_word=1)


def test_a_small_model_of_another_training_is_refused_where_its_folder_says_so(tmp_path):
    large, small = save_tiny_pair(tmp_path)
    DDIMScheduler(**TRAINED, prediction_type="v_prediction").save_pretrained(small / "scheduler")
    with pytest.raises(InputError, match="prediction_type is epsilon in the large one and v_prediction in the small one"):
        get_tstitch_pipepline(large, small, device="cpu")


def test_a_pipeline_without_an_autoencoder_says_so_and_takes_one() -> None:
    pair, vae = ROOT / "pretrained_models" / "emoji" / "sd", ROOT / "pretrained_models" / "emoji" / "vae"
    with pytest.raises(InputError, match="has no autoencoder"):
        get_tstitch_pipepline(pair, pair / "unet_small", device="cpu")
    pipe = get_tstitch_pipepline(pair, pair, vae=vae, device="cpu")
    assert stitched_unet(pipe).large is pipe.unet.large and len(pipe.unet.unets) == 2
