"""Recipes fill in defaults, and nothing but defaults."""

from __future__ import annotations

import pytest

from dit import sample, sample_ddp
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


def test_without_a_recipe_results_do_not_speak_of_one() -> None:
    assert "recipe" not in plan().settings


def test_an_unknown_or_misplaced_recipe_is_refused() -> None:
    with pytest.raises(InputError, match=r"unknown recipe 'dit-xl-2.27'; choose from dit-xl-2-cfg1\.5, "):
        plan("--recipe", "dit-xl-2.27")
    with pytest.raises(InputError, match="belongs to preset imagenet256, not emoji"):
        plan("--recipe", "dit-xl-2-cfg1.5", "--preset", "emoji")
