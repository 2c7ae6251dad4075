"""LDM against numbers made by the published code; tolerances are those given with the files, relative to the largest value of a tensor.

A file says by its "case" what it holds. Only some are copied here; TSTITCH_GOLDEN names a folder with all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Case, golden_files, load_case
from torch import Tensor, nn

from ldm.checkpoints import LDMCheckpoint, compvis_state_dict, load_ldm_first_stage, load_ldm_unet
from ldm.denoiser import LatentDenoiser
from ldm.losses import lvlb_weights, p_losses
from ldm.names import compvis_names
from ldm.networks import build_ldm_first_stage, build_ldm_unet
from ldm.sampling import PLMS, ddim_timesteps, ldm_betas, ldm_diffusion, published_schedule
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.sampling import Progress, sample
from tstitch.schedule import StitchSchedule
from tstitch.solvers import DDIM


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()  # false for nan


def weights(case: Case, prefix: str = "") -> dict[str, Tensor]:
    prefix = f"weights.{prefix}"
    return {name.removeprefix(prefix): t for name, t in case.tensors.items() if name.startswith(prefix)}


def denoiser_of(case: Case, params: dict, cond: dict, k: str = "", unconditional: Tensor | None = None) -> LatentDenoiser:
    unet = load_ldm_unet({name: t for name, t in weights(case, k).items() if not name.startswith("cond_stage_model.")}, params)
    table = case.tensors[f"weights.cond_stage_model.{k}embedding.weight"]
    denoiser = LatentDenoiser(unet, nn.Embedding.from_pretrained(table), cond["n_classes"])
    denoiser.unconditional = unconditional
    return denoiser


def diffusion_of(config: dict, num_steps: int | None):
    return ldm_diffusion(num_steps, config["linear_start"], config["linear_end"], config["timesteps"], config.get("beta_schedule", "linear"))


def guidance_of(config: dict, num_classes: int) -> ClassifierFreeGuidance:
    return ClassifierFreeGuidance(config["scale"], num_classes, channels=None)


def check_unet(case: Case, path: Path) -> None:
    tensors = dict(case.tensors)
    for name in case.config.get("weights_files", []):
        tensors |= load_case(path.parent / name).tensors
    unet = load_ldm_unet(weights(Case(case.config, tensors)), case.config["unet"])
    assert_equal(unet(tensors["in.x"], tensors["in.t"], encoder_hidden_states=tensors["in.context"]).sample, tensors["out.forward"], 1e-4)


def check_sampling(case: Case, path: Path) -> None:
    config, t = case.config, case.tensors
    denoiser = denoiser_of(case, config["unet"], config["cond"], unconditional=t["in.uncond"])
    for run in config["runs"]:
        diffusion = diffusion_of(config, run["S"])
        solver = PLMS(diffusion) if run["sampler"] == "plms" else DDIM(diffusion, run["eta"])
        seen: list[Progress] = []
        x_0 = sample(
            [denoiser], t["in.x_T"], t["in.classes"], schedule=StitchSchedule((1.0,)), solver=solver, guidance=guidance_of(run, denoiser.num_classes),
            noise=lambda step, like: t["noise"][step], callback=seen.append,
        )  # fmt: skip
        out = f"out.{run['id']}"
        assert_equal(x_0, t[out], 2e-4)
        assert solver.timesteps == t[f"{out}.model_timesteps"].tolist()
        assert_equal(seen[1 if run["sampler"] == "plms" else 0].x, t[f"{out}.x_after_first_step"], 2e-4)  # PLMS takes its first step twice
        assert_equal(seen[-1].pred_x0, t[f"{out}.pred_x0_last"], 2e-4)


def check_t_stitch(case: Case, path: Path) -> None:
    config, t = case.config, case.tensors
    denoisers = [denoiser_of(case, config["unets"][k], config["conds"][k], f"{k}.", t[f"in.uncond.{k}"]) for k in (0, 1)]
    for k, denoiser in enumerate(denoisers):
        assert_equal(denoiser.context(t["in.classes"]), t[f"out.cond.{k}"], 0)
    solver = DDIM(diffusion_of(config, config["S"]), config["eta"])
    for ratio in config["ratios"]:
        ran: list[int] = []
        x_0 = sample(
            denoisers, t["in.x_T"], t["in.classes"], schedule=published_schedule(ratio, solver), solver=solver,
            guidance=guidance_of(config, denoisers[0].num_classes), noise=lambda step, like: t["noise"][step],
            callback=lambda progress: ran.append(progress.denoiser),  # noqa: B023
        )  # fmt: skip
        assert ran == t[f"out.ratio_{ratio}.anchor_ids"].tolist()
        assert_equal(x_0, t[f"out.ratio_{ratio}"], 2e-4)


def check_kl(case: Case, path: Path) -> None:
    t = case.tensors
    vae = load_ldm_first_stage(weights(case), {name: case.config[name] for name in ("ddconfig", "embed_dim")}, "kl")
    posterior = vae.encode(t["in.image"]).latent_dist
    values = {"mean": posterior.mean, "logvar": posterior.logvar, "std": posterior.std, "kl": posterior.kl()}
    values["sample"] = posterior.mean + posterior.std * t["noise"][0]
    values |= {"decode": vae.decode(t["in.z"]).sample, "decode_of_mean": vae.decode(posterior.mean).sample}
    for name, value in values.items():
        assert_equal(value, t[f"out.{name}"], 2e-4)


def check_vq(case: Case, path: Path) -> None:
    t = case.tensors
    vq = load_ldm_first_stage(weights(case), {name: case.config[name] for name in ("ddconfig", "embed_dim", "n_embed")}, "vq")
    h = vq.encode(t["in.image"]).latents
    quantized, codebook_loss, (_, _, indices) = vq.quantize(t["in.z"])
    assert torch.equal(indices, t["out.indices"])
    assert torch.equal(vq.quantize(h)[2][2], t["out.encode_indices"])
    values = {
        "encode": h, "quantized": quantized, "codebook_loss": codebook_loss.view(1), "decode": vq.decode(t["in.z"]).sample,
        "decode_of_encode": vq.decode(h).sample, "decode_force_not_quantize": vq.decode(t["in.z"], force_not_quantize=True).sample,
    }  # fmt: skip
    for name, value in values.items():
        assert_equal(value, t[f"out.{name}"], 2e-4)


def check_losses(case: Case, path: Path) -> None:
    config, t = case.config, case.tensors
    denoiser = denoiser_of(case, config["unet"], config["cond"])
    assert_equal(denoiser.context(t["in.classes"]), t["out.cond"], 0)
    diffusion = diffusion_of(config, None)
    for run in config["runs"]:
        told = dict(run["ddpm"])
        logvar = torch.full((config["timesteps"],), float(told.pop("logvar_init", 0.0)))
        terms = p_losses(diffusion, denoiser, t["in.x_start"], t["in.t"], t["in.classes"], t["noise"][0], logvar=logvar, **told)
        terms["lvlb_weights_at_t"] = torch.from_numpy(lvlb_weights(diffusion)).float()[t["in.t"]]
        for name in ("loss", "loss_simple", "loss_vlb", "per_sample", "lvlb_weights_at_t"):
            expected = t[f"out.{run['id']}.{name}"]
            torch.testing.assert_close(terms[name].view_as(expected), expected, rtol=1e-4, atol=0)
        assert_equal(terms["x_noisy"], t["out.x_noisy"], 1e-4)
        assert_equal(terms["model_output"], t["out.model_output"], 1e-4)


CHECKS: dict[str, Callable[[Case, Path], None]] = {
    "unet_forward": check_unet,
    "sampling": check_sampling,
    "t_stitch": check_t_stitch,
    "first_stage_kl": check_kl,
    "first_stage_vq": check_vq,
    "p_losses": check_losses,
}


@pytest.mark.parametrize("path", [p for p in golden_files("ldm_*.safetensors") if ".weights" not in p.name], ids=lambda p: p.stem)
@torch.no_grad()
def test_networks_samplers_and_losses_equal_the_published_ones(path: Path) -> None:
    case = load_case(path)
    CHECKS[case.config["case"]](case, path)


@pytest.mark.parametrize("path", golden_files("ldm_schedules_*.json"), ids=lambda p: p.stem)
def test_schedules_and_timestep_grids_equal_the_published_ones(path: Path) -> None:
    golden = json.loads(path.read_text())
    for entry in golden["beta_schedules"]:
        ends = {name: entry[name] for name in ("linear_start", "linear_end") if name in entry}
        betas = ldm_betas(entry["schedule"], entry["n_timestep"], **ends)
        values = {"": betas, "alphas_cumprod_": np.cumprod(1 - betas)}
        for name, array in values.items():
            np.testing.assert_allclose(array[:5], entry[f"{name}first5"], rtol=1e-6)
            np.testing.assert_allclose(array[-5:], entry[f"{name}last5"], rtol=1e-6)
        assert (len(betas), betas.sum()) == (entry["n"], pytest.approx(entry["sum"], rel=1e-6))
    for entry in golden["ddim_timesteps"]:
        assert ddim_timesteps(entry["S"], entry["num_ddpm"], entry["method"]) == entry["timesteps"]
    for entry in golden["ddim_parameters"]:
        process = ldm_diffusion(entry["S"], entry["linear_start"], entry["linear_end"])
        before, after = process.alphas_cumprod, process.alphas_cumprod_prev
        np.testing.assert_allclose(before, entry["alphas"], rtol=1e-6)
        np.testing.assert_allclose(after, entry["alphas_prev"], rtol=1e-6)
        sigmas = entry["eta"] * np.sqrt((1 - after) / (1 - before) * (1 - before / after))
        np.testing.assert_allclose(sigmas, entry["sigmas"], rtol=1e-6)


@pytest.mark.parametrize("path", golden_files("ldm_state_dict_keys_*.json"), ids=lambda p: p.stem)
def test_every_key_of_a_whole_checkpoint_is_accounted_for(path: Path) -> None:
    golden = json.loads(path.read_text())
    config = golden["config"]
    kind = "kl" if config["first_stage"]["ddconfig"]["double_z"] else "vq"
    first_stage = build_ldm_first_stage(config["first_stage"], kind)
    for name, unets in (("single", [config["single_unet"]]), ("t_stitch", config["t_stitch_unets"])):
        state = {key: torch.zeros(shape) for key, shape in golden[name].items()}
        parts = LDMCheckpoint.from_state_dict(state)
        models = [build_ldm_unet(params) for params in unets]
        for part, model in zip([*parts.unets, *parts.ema, parts.first_stage], [*models, *models, first_stage], strict=True):
            assert {key: value.shape for key, value in part.items()} == {key: value.shape for key, value in compvis_state_dict(model).items()}
            assert len(set(compvis_names(model).values())) == len(part)
        assert [len(e["embedding.weight"][0]) for e in parts.embedders] == [params["context_dim"] for params in unets]
        back = parts.state_dict()
        assert back.keys() == state.keys()
        assert all(value is state[key] for key, value in back.items())
