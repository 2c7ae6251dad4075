"""The DiT family against numbers made by the published code; tolerances are those given with the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_files, load_case

from dit.models import DiT_models
from tstitch.diffusion import create_diffusion, named_betas, space_timesteps
from tstitch.errors import InputError
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.sampling import Progress, sample
from tstitch.schedule import StitchSchedule, steps_by_denoiser
from tstitch.solvers import DDIM, DDPM


def each(pattern: str):
    return pytest.mark.parametrize("path", golden_files(pattern), ids=lambda p: p.stem)


def relative_to_largest(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("path", golden_files("gta_*.safetensors") + golden_files("dit_forward_*.safetensors"), ids=lambda p: p.stem)
@torch.no_grad()
def test_forward_and_guidance_equal_the_published_dit_and_gta(path: Path) -> None:
    case = load_case(path)
    (model,), t = case.models(), case.tensors
    assert (model(t["in.x"], t["in.t"], t["in.y"]) - t["out.forward"]).abs().max() <= 1e-5
    guided = model.forward_with_cfg(t["in.x_cfg"], t["in.t_cfg"], t["in.y_cfg"], case.config["cfg_scale"])
    assert (guided - t["out.forward_with_cfg"]).abs().max() <= 5e-5


def schedule_of(config: dict) -> StitchSchedule:
    if "fractions" in config:
        return StitchSchedule(tuple(config["fractions"]), switch_by="t")
    return StitchSchedule.from_ratio(config["ratio"], switch_by="t") if "ratio" in config else StitchSchedule((1.0,))


@pytest.mark.parametrize("path", golden_files("sample_*.safetensors") + golden_files("tstitch_*.safetensors"), ids=lambda p: p.stem)
def test_sampling_equals_the_published_loops(path: Path) -> None:
    case = load_case(path)
    config, t = case.config, case.tensors
    guided = config["cfg_scale"] is not None
    n = len(t["in.x_T"]) // 2 if guided else len(t["in.x_T"])  # a guided reference stores [z, z] and drifts apart in the second half
    diffusion = create_diffusion(**config["create_diffusion"])
    sampler = dict(config["sampler"])
    solver = {"ddim": DDIM, "ddpm": DDPM}[sampler.pop("name")](diffusion, **sampler)
    seen: list[Progress] = []
    x_0 = sample(
        case.models(), t["in.x_T"][:n], t["in.y"][:n], schedule=schedule_of(config), solver=solver,
        guidance=ClassifierFreeGuidance(config["cfg_scale"], config["null_class"]) if guided else None,
        noise=lambda i, like: t["noise"][i, :n], callback=seen.append,
    )  # fmt: skip
    assert solver.timesteps == t["out.timesteps"].tolist()
    if "out.model_index" in t:
        assert [step.denoiser for step in seen] == t["out.model_index"].tolist()
    assert relative_to_largest(x_0, t["out.sample"][:n]) <= 1e-4
    assert relative_to_largest(torch.stack([step.x for step in seen]), t["out.trajectory"][:, :n]) <= 1e-4
    assert relative_to_largest(torch.stack([step.pred_x0 for step in seen]), t["out.pred_xstart"][:, :n]) <= 1e-3


@each("losses_*.safetensors")
@torch.no_grad()
def test_training_losses_equal_the_published_ones(path: Path) -> None:
    case = load_case(path)
    (model,), t = case.models(), case.tensors
    diffusion = create_diffusion(**case.config["create_diffusion"])
    assert (diffusion.q_sample(t["in.x_start"], t["in.t"], t["noise"]) - t["out.x_t"]).abs().max() <= 1e-5
    terms = diffusion.training_losses(model, t["in.x_start"], t["in.t"], {"y": t["in.y"]}, noise=t["noise"])
    assert (terms["mse"] - t["out.mse"]).abs().max() <= 1e-5
    for name in {"vb", "loss"} & {key.removeprefix("out.") for key in t}:
        torch.testing.assert_close(terms[name], t[f"out.{name}"], atol=5e-4, rtol=1e-5)


@each("bpd_*.safetensors")
def test_bits_per_dimension_equal_the_published_ones(path: Path) -> None:
    case = load_case(path)
    (model,), t, config = case.models(), case.tensors, case.config
    bpd = create_diffusion(**config["create_diffusion"]).calc_bpd_loop(
        model, t["in.x_start"], clip_denoised=config["clip_denoised"], model_kwargs={"y": t["in.y"]}, noise=lambda k, like: t["noise"][k]
    )
    torch.testing.assert_close(bpd["prior_bpd"], t["out.prior_bpd"], rtol=1e-4, atol=1e-6)
    for name in ("total_bpd", "vb", "mse", "xstart_mse"):
        torch.testing.assert_close(bpd[name], t[f"out.{name}"], rtol=1e-4, atol=0)


@each("respacing*.json")
def test_respacing_and_betas_are_the_published_ones(path: Path) -> None:
    golden = json.loads(path.read_text())
    total = golden["num_timesteps"]
    for spec, kept in golden["space_timesteps"].items():
        assert space_timesteps(total, spec) == kept, spec
    for spec, schedule in golden["respaced"].items():
        diffusion = create_diffusion(spec, diffusion_steps=total)
        assert diffusion.timestep_map.tolist() == schedule["timestep_map"]
        ours = {
            "betas": diffusion.betas, "alphas_cumprod": diffusion.alphas_cumprod, "alphas_cumprod_prev": diffusion.alphas_cumprod_prev,
            "posterior_variance": diffusion.posterior_variance, "posterior_log_variance_clipped": diffusion.posterior_log_variance_clipped,
            "posterior_mean_coef1": diffusion.posterior_mean_coef_x0, "posterior_mean_coef2": diffusion.posterior_mean_coef_xt,
        }  # fmt: skip
        for name, values in ours.items():
            np.testing.assert_allclose(values, schedule[name], rtol=1e-12, err_msg=f"{spec} {name}")
    for name, expected in golden["beta_schedules"].items():
        betas = named_betas(name, expected["num_diffusion_timesteps"])
        np.testing.assert_allclose(betas[:5], expected["first5"], rtol=1e-12)
        np.testing.assert_allclose(betas[-5:], expected["last5"], rtol=1e-12)
        np.testing.assert_allclose(betas.sum(), expected["sum"], rtol=1e-12)
    for spec in golden["errors"]:
        with pytest.raises(InputError):
            space_timesteps(total, spec)


@each("stitch_index*.json")
def test_stitching_counts_the_published_small_steps_by_both_rules(path: Path) -> None:
    golden = json.loads(path.read_text())
    grids = golden["count_small"] | golden["count_small_ddim_spacing_rule_dit"]
    for spec, counts in grids.items():
        timesteps = space_timesteps(1000, spec)[::-1]
        for ratio, expected in counts.items():
            by_t = StitchSchedule.from_ratio(float(ratio), switch_by="t").legs(len(timesteps), timesteps=timesteps)
            assert steps_by_denoiser(by_t, 2)[0] == (expected["dit"] if isinstance(expected, dict) else expected), (spec, ratio)
            if isinstance(expected, dict):
                by_step = StitchSchedule.from_ratio(float(ratio)).legs(len(timesteps))
                assert steps_by_denoiser(by_step, 2)[0] == expected["sd"], (spec, ratio)


def test_state_dict_of_xl_2_has_the_published_keys_shapes_and_order() -> None:
    golden = json.loads((GOLDEN / "dit_xl2_state_dict.json").read_text())
    published = golden.get("state_dict", golden.get("tensors", golden))
    with torch.device("meta"):
        ours = DiT_models["DiT-XL/2"](input_size=32, num_classes=1000).state_dict()
    assert {k: list(v.shape) for k, v in ours.items()} == {k: list(v["shape"] if isinstance(v, dict) else v) for k, v in published.items()}
    assert list(ours) == list(published)


PARAMETERS = {
    "S": (32_963_360, 32_945_024, 33_148_160), "B": (130_512_416, 130_475_648, 130_881_536),
    "L": (458_102_816, 458_053_760, 458_594_816), "XL": (675_129_632, 675_074_432, 675_683_072),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DiT_models))
def test_every_size_has_the_published_number_of_parameters(name: str) -> None:
    size, patch = name.removeprefix("DiT-").split("/")
    with torch.device("meta"):
        model = DiT_models[name](input_size=32, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size][(2, 4, 8).index(int(patch))]
