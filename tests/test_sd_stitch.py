"""Stitched diffusers pipelines: what they share with the unstitched ones, who runs which step, and what is refused."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image
from sd_tiny import (
    BETAS,
    PICTURE,
    draw,
    small_sd,
    small_xl,
    tiny_controlnet,
    tiny_lcm,
    tiny_sd,
    tiny_sd_controlnet,
    tiny_sdxl,
    tiny_sdxl_controlnet,
    tiny_unet,
    tiny_vae,
)
from torch import Tensor, nn

from sd.stitched_unet import steps_of_calls
from sd.tstitch_sd_utils import stitch, stitched_unet, unstitch
from tstitch.errors import InputError
from tstitch.schedule import Leg, StitchSchedule

TRAINED = BETAS | {"steps_offset": 1}
MASK = Image.fromarray(np.where(np.arange(32) < 16, 255, 0)[None].repeat(32, 0).astype(np.uint8))


def record(unet: nn.Module) -> list[float]:
    """Timesteps of the calls of one U-Net, from now on."""
    seen: list[float] = []
    unet.register_forward_pre_hook(lambda _, args: seen.append(float(args[1])))
    return seen


PIPELINES: dict[str, tuple[Callable, Callable, dict]] = {
    "sd": (tiny_sd, small_sd, {}),
    "sd-img2img": (lambda: tiny_sd(pipeline=StableDiffusionImg2ImgPipeline), small_sd, {"image": PICTURE, "strength": 0.6}),
    "sd-inpaint": (lambda: tiny_sd(pipeline=StableDiffusionInpaintPipeline), small_sd, {"image": PICTURE, "mask_image": MASK, "height": 32, "width": 32}),
    "sd-controlnet": (tiny_sd_controlnet, lambda: tiny_unet(1, transformer_layers_per_block=2), {"image": PICTURE}),
    "lcm": (tiny_lcm, lambda: small_sd(time_cond_proj_dim=16), {}),
    "sdxl": (tiny_sdxl, small_xl, {}),
    "sdxl-img2img": (lambda: tiny_sdxl(pipeline=StableDiffusionXLImg2ImgPipeline), small_xl, {"image": PICTURE, "strength": 0.7}),
    "sdxl-inpaint": (lambda: tiny_sdxl(pipeline=StableDiffusionXLInpaintPipeline), small_xl, {"image": PICTURE, "mask_image": MASK, "height": 32, "width": 32}),
    "sdxl-controlnet": (tiny_sdxl_controlnet, lambda: tiny_unet(1, xl=True, transformer_layers_per_block=1), {"image": PICTURE}),
}  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_ratio_0_is_the_large_model_alone_and_1_the_small_one_bit_for_bit(name):
    make, make_small, kwargs = PIPELINES[name]
    large_alone = draw(make(), **kwargs)
    small_alone = make()
    small_alone.unet = make_small()
    small_alone = draw(small_alone, **kwargs)
    pipe = stitch(make(), make_small())
    assert torch.equal(draw(pipe, **kwargs), large_alone), "without a ratio nothing changes"
    assert torch.equal(draw(pipe, unet_s_ratio=0, **kwargs), large_alone)
    assert torch.equal(draw(pipe, unet_s_ratio=1, **kwargs), small_alone)
    between = draw(pipe, unet_s_ratio=0.5, **kwargs)
    assert not torch.equal(between, large_alone)
    assert not torch.equal(between, small_alone)
    assert torch.equal(draw(unstitch(pipe), **kwargs), large_alone)


FIRST_ORDER = ["DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "LCM"]
SECOND_ORDER = ["HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"]


@pytest.mark.parametrize("name", [*FIRST_ORDER, *SECOND_ORDER])
@pytest.mark.parametrize("num_steps", [7, 10])
def test_at_ratio_03_the_small_model_runs_exactly_floor_of_03_n_steps(name, num_steps):
    pipe = stitch(tiny_sd(scheduler=getattr(diffusers, f"{name}Scheduler")(**TRAINED)), small_sd())
    small, large = map(record, pipe.unet.unets)
    draw(pipe, steps=num_steps, unet_s_ratio=0.3)
    small_steps = math.floor(0.3 * num_steps)
    calls_per_step = 2 if name in SECOND_ORDER else 1
    assert len(small) == small_steps * calls_per_step, "a step of the trajectory, not a call"
    assert small + large == [float(t) for t in pipe.scheduler.timesteps]
    assert pipe.unet.legs == [Leg(0, 0, small_steps), Leg(1, small_steps, num_steps)]


@pytest.mark.parametrize("skip_prk_steps", [True, False])
def test_the_extra_calls_with_which_pndm_starts_belong_to_its_first_steps(skip_prk_steps):
    pipe = stitch(tiny_sd(scheduler=PNDMScheduler(**TRAINED, skip_prk_steps=skip_prk_steps)), small_sd())
    small, large = map(record, pipe.unet.unets)
    draw(pipe, steps=10, unet_s_ratio=0.3)
    assert (len(small), len(large)) == ((4, 7) if skip_prk_steps else (12, 7))
    assert steps_of_calls(pipe.scheduler, len(small) + len(large))[-1] == 9


def test_a_single_step_belongs_to_the_large_model_until_the_ratio_is_1():
    pipe = stitch(tiny_sd(scheduler=HeunDiscreteScheduler(**TRAINED)), small_sd())
    draw(pipe, steps=1, unet_s_ratio=0.99)
    assert pipe.unet.legs == [Leg(1, 0, 1)]
    draw(pipe, steps=1, unet_s_ratio=1)
    assert pipe.unet.legs == [Leg(0, 0, 1)]


@pytest.mark.parametrize("make_scheduler", [DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler])
def test_image_to_image_counts_its_own_steps(make_scheduler):
    scheduler = make_scheduler(**TRAINED, skip_prk_steps=True) if make_scheduler is PNDMScheduler else make_scheduler(**TRAINED)
    pipe = stitch(tiny_sd(pipeline=StableDiffusionImg2ImgPipeline, scheduler=scheduler), small_sd())
    draw(pipe, steps=10, image=PICTURE, strength=0.6, unet_s_ratio=0.5)
    assert pipe.unet.legs == [Leg(0, 0, 3), Leg(1, 3, 6)], "half of the 6 steps that strength 0.6 leaves of 10"


def test_a_trajectory_shared_by_a_base_and_a_refiner_counts_each_ones_own_steps():
    base = stitch(tiny_sdxl(), small_xl())
    latents = draw(base, steps=10, denoising_end=0.8, unet_s_ratio=0.5)
    assert base.unet.legs == [Leg(0, 0, 4), Leg(1, 4, 8)]
    refiner = stitch(tiny_sdxl(pipeline=StableDiffusionXLImg2ImgPipeline), small_xl())
    draw(refiner, steps=10, image=latents, denoising_start=0.8, unet_s_ratio=0.5)
    assert refiner.unet.legs == [Leg(0, 0, 1), Leg(1, 1, 2)]


def test_timesteps_given_by_hand_are_cut_like_any_others():
    pipe = stitch(tiny_sd(scheduler=LCMScheduler(**TRAINED)), small_sd())
    draw(pipe, steps=None, timesteps=[900, 500, 300, 100], unet_s_ratio=0.5)
    assert pipe.unet.legs == [Leg(0, 0, 2), Leg(1, 2, 4)]


def test_more_u_nets_take_fractions_and_a_schedule_may_let_one_come_back():
    pipe = stitch(tiny_sd(), [small_sd(), tiny_unet(2, width=12)])
    draw(pipe, steps=10, unet_s_ratio=[0.4, 0.2, 0.4])
    assert pipe.unet.legs == [Leg(0, 0, 4), Leg(1, 4, 6), Leg(2, 6, 10)]
    draw(pipe, steps=10, unet_s_ratio=0.3)
    assert pipe.unet.legs == [Leg(0, 0, 3), Leg(2, 3, 10)], "one number is the first U-Net's share, the last takes the rest"
    draw(pipe, steps=10, unet_s_ratio=StitchSchedule((0.2, 0.6, 0.2), order=(0, 2, 0)))
    assert pipe.unet.legs == [Leg(0, 0, 2), Leg(2, 2, 8), Leg(0, 8, 10)]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd-controlnet"])
@pytest.mark.parametrize("keyword", ["negative_prompts", "neg_prompt", "unet_ratio"])
def test_an_unknown_keyword_is_a_type_error(name, keyword):
    make, make_small, kwargs = PIPELINES[name]
    pipe = stitch(make(), make_small())
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
        draw(pipe, **kwargs, **{keyword: "x"})


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), [0.5, 0.6], [0.2, 0.3, 0.5], [1.5, -0.5], StitchSchedule((0.2, 0.3, 0.5))])
def test_a_ratio_that_makes_no_shares_is_a_value_error(pipe, ratio):
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\]|fractions|shares for 2 U-Nets|needs 3 denoisers"):
        draw(pipe, unet_s_ratio=ratio)
    draw(pipe, unet_s_ratio=0.5)


@pytest.mark.parametrize("schedule", [StitchSchedule.from_ratio(0.5, "t"), StitchSchedule.from_thresholds([3.0])])
def test_a_schedule_that_does_not_count_steps_is_refused(pipe, schedule):
    with pytest.raises(InputError, match=f"not {schedule.switch_by}; pass a schedule with switch_by='step'"):
        draw(pipe, unet_s_ratio=schedule)


@pytest.mark.parametrize("ratio", ["0.4", None, [0.5, "0.5"]])
def test_a_ratio_that_is_no_number_is_a_type_error(pipe, ratio):
    with pytest.raises(TypeError, match="unet_s_ratio"):
        draw(pipe, unet_s_ratio=ratio)


def test_the_call_shows_its_keyword_beside_those_of_the_pipeline(pipe):
    names = list(inspect.signature(pipe.__call__).parameters)
    assert [name for name in names if name != "unet_s_ratio"] == list(inspect.signature(tiny_sd().__call__).parameters)
    assert "unet_s_ratio" in names
    assert isinstance(pipe, StableDiffusionPipeline)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"in_channels": 9}, "in_channels is 4 in the large one and 9 in the small one"),
        ({"out_channels": 8}, "out_channels is 4 in the large one and 8"),
        ({"sample_size": 16}, "sample_size is 8 in the large one and 16"),
        ({"cross_attention_dim": 48}, "cross_attention_dim is 32 in the large one and 48"),
        ({"time_cond_proj_dim": 16}, "time_cond_proj_dim is None in the large one and 16"),
    ],
)
def test_u_nets_that_do_not_fit_are_refused_with_the_two_values(config, said):
    pipe = tiny_sd()
    with pytest.raises(ValueError, match=said):
        stitch(pipe, small_sd(**config))
    assert type(pipe) is StableDiffusionPipeline, "a refusal leaves the pipeline as it was"


def test_other_additional_conditions_of_sdxl_are_refused():
    with pytest.raises(ValueError, match="addition_time_embed_dim is 8 in the large one and 4 in the small one; projection_class_embeddings_input_dim is 80"):
        stitch(tiny_sdxl(), small_xl(addition_time_embed_dim=4, projection_class_embeddings_input_dim=56))
    with pytest.raises(ValueError, match="addition_embed_type is text_time in the large one and None"):
        stitch(tiny_sdxl(), small_sd(cross_attention_dim=64))


def test_u_nets_of_other_predictions_or_noise_schedules_are_refused():
    v_prediction = DDIMScheduler(**TRAINED, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction_type is epsilon in the large one and v_prediction in the small one"):
        stitch(tiny_sd(), small_sd(), small_scheduler=v_prediction)
    with pytest.raises(ValueError, match="prediction_type is epsilon"):
        stitch(tiny_sd(), tiny_sd(unet=small_sd(), scheduler=v_prediction))
    with pytest.raises(ValueError, match="beta_end is 0.012 in the large one and 0.02"):
        stitch(tiny_sd(), small_sd(), small_scheduler=DDIMScheduler(**(TRAINED | {"beta_end": 0.02})).config)
    stitch(tiny_sd(), tiny_sd(unet=small_sd(), scheduler=HeunDiscreteScheduler(**TRAINED)))


def test_a_small_model_that_cannot_take_what_a_controlnet_adds_is_refused():
    with pytest.raises(ValueError, match=r"block_out_channels is \[16, 32\] in the large one and \[8, 16\]"):
        stitch(tiny_sd_controlnet(), small_sd())
    with pytest.raises(ValueError, match="layers_per_block is 1 in the large one and 2"):
        stitch(tiny_sd_controlnet(), tiny_unet(1, layers_per_block=2))


def test_lists_of_equal_numbers_are_those_numbers():
    small = small_sd()
    small.register_to_config(cross_attention_dim=[32, 32], sample_size=[8, 8])
    stitch(tiny_sd(), small)


def test_only_pipelines_with_a_u_net_are_stitched():
    with pytest.raises(InputError, match="no U-Net"):
        stitch(diffusers.DiTPipeline(None, tiny_vae(), DDIMScheduler()), small_sd())


def test_two_calls_in_a_row_know_nothing_of_each_other(pipe):
    first = draw(pipe, unet_s_ratio=0.5)
    draw(pipe, steps=9, unet_s_ratio=0.9)
    assert torch.equal(draw(pipe, unet_s_ratio=0.5), first)


@pytest.mark.parametrize("where", ["callback", "small", "large"])
def test_a_call_that_breaks_off_leaves_nothing_behind(pipe, where):
    whole = draw(pipe, unet_s_ratio=0.5)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        if where == "callback":
            draw(pipe, unet_s_ratio=0.5, callback_on_step_end=fail)
        else:
            hook = pipe.unet.unets[where == "large"].register_forward_pre_hook(fail)
            try:
                draw(pipe, unet_s_ratio=0.5)
            finally:
                hook.remove()
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(draw(pipe, unet_s_ratio=0.5), whole)


def test_a_pipeline_that_is_told_to_stop_stops_without_complaint(pipe):
    seen = []

    def stop(pipe: DiffusionPipeline, step: int, _: Tensor, kwargs: dict) -> dict:
        seen.append(step)
        pipe._interrupt = step == 2
        return kwargs

    whole = draw(pipe, unet_s_ratio=0.5)
    draw(pipe, unet_s_ratio=0.5, callback_on_step_end=stop)
    assert seen == [0, 1, 2]
    assert torch.equal(draw(pipe, unet_s_ratio=0.5), whole)


def test_callbacks_see_every_step_and_may_change_the_latents(pipe):
    seen = []

    def halve(_: DiffusionPipeline, step: int, __: Tensor, kwargs: dict) -> dict:
        seen.append(step)
        return {"latents": kwargs["latents"] / 2}

    changed = draw(pipe, unet_s_ratio=0.5, callback_on_step_end=halve, callback_on_step_end_tensor_inputs=["latents"])
    assert seen == list(range(6))
    assert not torch.equal(changed, draw(pipe, unet_s_ratio=0.5))
    old_style = []
    with pytest.warns(FutureWarning):
        draw(pipe, unet_s_ratio=0.5, callback=lambda step, *_: old_style.append(step), callback_steps=2)
    assert old_style == [0, 2, 4]


def test_a_second_call_in_the_middle_of_the_first_is_refused(pipe):
    def again(pipe: DiffusionPipeline, *_: object) -> None:
        draw(pipe, unet_s_ratio=0.5)

    with pytest.raises(InputError, match="sampling already"):
        draw(pipe, unet_s_ratio=0.5, callback_on_step_end=again)


def test_stitched_u_nets_do_not_guess_where_they_are(pipe):
    with pytest.raises(InputError, match=r"not that of a stitched pipeline; call stitch\(pipe\)"):
        pipe.unet(torch.zeros(1, 4, 8, 8), 500, torch.zeros(1, 77, 32))
    image_to_image = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(InputError, match="not that of a stitched pipeline"):
        draw(image_to_image, image=PICTURE)
    stitch(image_to_image)
    draw(image_to_image, steps=10, image=PICTURE, strength=0.6, unet_s_ratio=0.5)
    assert image_to_image.unet.legs == [Leg(0, 0, 3), Leg(1, 3, 6)]
    with pytest.raises(InputError, match="not stitched"):
        stitch(tiny_sd())
    with pytest.raises(InputError, match="offload and small_scheduler where they are first stitched"):
        stitch(image_to_image, offload="switch")


def test_a_pipeline_of_a_stitched_ones_components_may_ask_more_of_its_u_nets(pipe):
    controlled = StableDiffusionControlNetPipeline(**pipe.components, controlnet=tiny_controlnet(), requires_safety_checker=False)
    with pytest.raises(InputError, match=r"block_out_channels is \[16, 32\] in the large one and \[8, 16\]"):
        stitch(controlled)


class StrayingPipeline(StableDiffusionPipeline):
    """Calls its U-Net in ways that do not follow its scheduler."""

    @torch.no_grad()
    def __call__(self, how: str) -> None:
        self.scheduler.set_timesteps(4)
        x, context = torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, 32)
        for t in self.scheduler.timesteps[: 2 if how == "too few" else None]:
            output = self.unet(x, t - 3 if how == "other timesteps" else t, context).sample
            x = self.scheduler.step(output, t, x).prev_sample
        if how == "too many":
            self.unet(x, t, context)


@pytest.mark.parametrize(
    ("how", "said"),
    [("other timesteps", "that are not its scheduler's"), ("too few", "took 2 of 4 steps"), ("too many", "after all 4 timesteps")],
)
def test_a_pipeline_that_strays_from_its_scheduler_is_an_error_rather_than_a_guess(how, said):
    pipe = stitch(tiny_sd(pipeline=StrayingPipeline), small_sd())
    with pytest.raises(InputError, match=said):
        pipe(how, unet_s_ratio=0.5)
    pipe("well", unet_s_ratio=0.5)
    assert pipe.unet.legs == [Leg(0, 0, 2), Leg(1, 2, 4)], "a pipeline that does not say its number of timesteps takes all of them"


def test_all_ratios_start_from_the_same_latents():
    pipe = stitch(tiny_sdxl(), small_xl())
    starts: list[Tensor] = []
    for unet in pipe.unet.unets:
        unet.register_forward_pre_hook(lambda _, args: starts.append(args[0].clone()))
    first = []
    for ratio in (0, 0.5, 1):
        starts.clear()
        draw(pipe, unet_s_ratio=ratio)
        first.append(starts[0])
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])
    draw(pipe, seed=1)
    assert not torch.equal(starts[-6], first[0])


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("ratio", [0, 0.5, 1])
def test_a_negative_prompt_acts_at_every_ratio(name, ratio):
    make, make_small, _ = PIPELINES[name]
    pipe = stitch(make(), make_small())
    plain, ugly, dark = (draw(pipe, unet_s_ratio=ratio, negative_prompt=words) for words in (None, "ugly", "dark"))
    assert not torch.equal(plain, ugly)
    assert not torch.equal(ugly, dark)


def test_a_batch_of_prompts_with_a_generator_each_gives_the_pictures_of_the_prompts_alone(pipe):
    prompts = ["a red dog", "a blue cat", "a hat"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    batch = pipe(prompts, num_inference_steps=6, generator=generators, output_type="latent", unet_s_ratio=0.5).images
    for seed, (prompt, latents) in enumerate(zip(prompts, batch, strict=True)):
        torch.testing.assert_close(draw(pipe, prompt, seed=seed, unet_s_ratio=0.5)[0], latents, atol=1e-4, rtol=1e-4)
    assert draw(pipe, num_images_per_prompt=2, unet_s_ratio=0.5).shape == (2, 4, 8, 8)


# What else is done to pipelines


def test_what_is_asked_of_the_u_net_is_asked_of_the_large_one(pipe):
    large = pipe.unet.large
    assert pipe.unet.config is large.config
    assert pipe.unet.dtype == torch.float32
    assert pipe.unet.device == torch.device("cpu")
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    assert {type(processor).__name__ for processor in large.attn_processors.values()} == {"AttnProcessor"}
    pipe.unet.encoder_hid_proj = None
    assert "encoder_hid_proj" not in vars(pipe.unet)
    with pytest.raises(AttributeError):
        _ = pipe.unet.no_such_thing
    copied = copy.deepcopy(pipe)
    assert torch.equal(draw(copied, unet_s_ratio=0.5), draw(pipe, unet_s_ratio=0.5))


@pytest.mark.parametrize("how", ["the stitched module", "in place", pytest.param("each before stitching", marks=pytest.mark.slow)])
def test_compiled_u_nets_are_stitched_like_others(how):
    plain = draw(stitch(tiny_sd(), small_sd()), steps=3, unet_s_ratio=0.4)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    pipe = tiny_sd()
    if how == "each before stitching":
        pipe.unet = torch.compile(pipe.unet, backend=backend)
        stitch(pipe, torch.compile(small_sd(), backend=backend))
    else:
        stitch(pipe, small_sd())
        if how == "in place":
            pipe.unet.compile(backend=backend)
        else:
            pipe.unet = torch.compile(pipe.unet, backend=backend)
    torch.testing.assert_close(draw(pipe, steps=3, unet_s_ratio=0.4), plain, atol=1e-4, rtol=1e-4)
    assert len([nodes for nodes in graphs if nodes > 50]) == 2, "one graph for each U-Net, neither cut in pieces"
    assert stitched_unet(pipe).legs == [Leg(0, 0, 1), Leg(1, 1, 3)]
    torch.compiler.reset()


def test_stitching_again_replaces_the_small_u_net_and_unstitching_twice_is_unstitching_once(pipe):
    large = pipe.unet.large
    stitch(pipe, tiny_unet(5, width=12))
    assert len(pipe.unet.unets) == 2
    assert pipe.unet.large is large
    stitched = pipe.unet
    with pytest.raises(InputError, match="cross_attention_dim"):
        stitch(pipe, small_sd(cross_attention_dim=48))
    assert pipe.unet is stitched, "a refusal leaves the pipeline as it was"
    assert unstitch(unstitch(pipe)).unet is large
