"""Recipes fill in defaults, and nothing but defaults."""

from __future__ import annotations

from types import ModuleType

import pytest

from dit import sample, sample_ddp, sample_ddp_t_stitch, sample_t_stitch
from tstitch.cli import SamplingPlan, choose_file, sampling_plan
from tstitch.errors import InputError
from tstitch.presets import PRESETS, RECIPES


def plan(*arguments: str) -> SamplingPlan:
    return sampling_plan(sample.parse_args([*arguments, "--device", "cpu"]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_alone_gives_its_own_settings(name: str) -> None:
    recipe, made = RECIPES[name], plan("--recipe", name)
    assert (made.preset.name, made.image_size) == (recipe.preset, PRESETS[recipe.preset].image_size)
    assert (type(made.solver).__name__.lower(), made.solver.num_steps) == (recipe.solver, recipe.num_sampling_steps)
    assert (made.guidance.scale, made.guidance.channels, made.vae) == (recipe.cfg_scale, recipe.cfg_channels, recipe.vae)
    assert made.settings["recipe"] == name
    file = choose_file(sample.parse_args(["--recipe", name]), made)
    assert file.model == recipe.model and file.path.name == f"dit_{recipe.model[4:-2].lower()}_{made.image_size}.pt"


def test_the_generator_takes_the_published_number_of_pictures_a_picture_script_does_not() -> None:
    def count(*arguments: str) -> int:
        args = sample_ddp.parse_args([*arguments, "--device", "cpu"])
        return len(sampling_plan(args, fid=True, solver="ddpm").labels)

    assert count("--recipe", "t-stitch-dit-s") == 5_000
    assert count("--recipe", "t-stitch-dit-s", "--num-fid-samples", "7") == 7
    assert len(plan("--recipe", "t-stitch-dit-s").labels) == len(PRESETS["imagenet256"].labels)


def test_what_is_given_stands_above_the_recipe_and_is_what_the_result_says() -> None:
    made = plan("--recipe", "dit-xl-2-cfg1.5", "--num-sampling-steps", "10", "--solver", "ddim", "--cfg-scale", "4", "--cfg-channels", "all", "--vae", "mse")
    assert made.settings.items() >= {"num_steps": 10, "solver": "DDIM", "cfg_scale": 4.0, "cfg_channels": "all"}.items()
    assert made.vae == "stabilityai/sd-vae-ft-mse"
    assert choose_file(sample.parse_args(["--recipe", "t-stitch-dit-s", "--model", "DiT-B/2"]), plan("--recipe", "t-stitch-dit-s")).model == "DiT-B/2"


OVERRIDES = {
    "model": ["--model", "DiT-B/2"],
    "steps": ["--num-sampling-steps", "100"],
    "solver": ["--solver", "ddim"],
    "scale": ["--cfg-scale", "4"],
    "channels": ["--cfg-channels", "all"],
    "autoencoder": ["--vae", "mse"],
    "size": ["--image-size", "512"],
    "classes": ["--num-classes", "10", "--class-labels", "1"],
}
SAME = ["--model", "DiT-XL/2", "--num-sampling-steps", "250", "--solver", "ddpm", "--cfg-scale", "1.5", "--cfg-channels", "3", "--vae", "ema"]


@pytest.mark.parametrize("case", OVERRIDES)
def test_what_is_overridden_no_longer_bears_the_recipe_s_name(case: str) -> None:
    words = ["--recipe", "dit-xl-2-cfg1.5", *OVERRIDES[case]]
    made = plan(*words)
    assert made.recipe is None and "recipe" not in made.settings
    assert made.num_steps == (100 if case == "steps" else 250)  # its other values stay the defaults


def test_what_repeats_the_recipe_s_own_values_bears_its_name() -> None:
    assert plan("--recipe", "dit-xl-2-cfg1.5", *SAME, "--class-labels", "1", "--num-images", "2").settings["recipe"] == "dit-xl-2-cfg1.5"


def test_the_recipe_s_model_stays_the_default_where_another_value_is_overridden() -> None:
    words = ["--recipe", "t-stitch-dit-s", "--cfg-scale", "4"]
    assert choose_file(sample.parse_args(words), plan(*words)).model == "DiT-S/2"


@pytest.mark.parametrize(("words", "name"), [([], "t-stitch-dit-s"), (["--num-fid-samples", "7"], None), (["--class-labels", "1"], None)])
def test_a_number_of_other_pictures_is_not_the_recipe_s(words: list[str], name: str | None) -> None:
    args = sample_ddp.parse_args(["--recipe", "t-stitch-dit-s", *words, "--device", "cpu"])
    assert sampling_plan(args, fid=True, solver="ddpm").settings.get("recipe") == name


@pytest.mark.parametrize("script", [sample_t_stitch, sample_ddp_t_stitch], ids=["pictures", "generator"])
def test_a_stitched_run_takes_a_recipe_s_values_and_not_its_name(script: ModuleType) -> None:
    fid = script is sample_ddp_t_stitch
    made = sampling_plan(script.parse_args(["--recipe", "dit-xl-2-cfg1.25", "--device", "cpu"]), fid=fid)
    assert (made.num_steps, made.guidance.scale, type(made.solver).__name__) == (250, 1.25, "DDPM")
    assert made.recipe is None and "recipe" not in made.settings


def test_without_a_recipe_results_do_not_speak_of_one() -> None:
    assert "recipe" not in plan().settings


def test_an_unknown_or_misplaced_recipe_is_refused() -> None:
    with pytest.raises(InputError, match=r"unknown recipe 'dit-xl-2.27'; choose from dit-xl-2-cfg1\.5, "):
        plan("--recipe", "dit-xl-2.27")
    with pytest.raises(InputError, match="belongs to preset imagenet256, not emoji"):
        plan("--recipe", "dit-xl-2-cfg1.5", "--preset", "emoji")
