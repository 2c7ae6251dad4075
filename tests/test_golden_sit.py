"""SiT against numbers made by the published code; tolerances are those given with the files, relative to the largest value of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Case, golden_files, load_case
from torch import Tensor

from sit.models import SiT
from sit.transport import PATHS, Sampler, Transport, create_transport
from sit.transport.ode import ADAPTIVE

WORDS = {"inccreasing-decreasing": "increasing-decreasing"}  # the published code misspells its own choice


def each(pattern: str):
    return pytest.mark.parametrize("path", golden_files(pattern), ids=lambda p: p.stem)


def each_run(pattern: str):
    runs = [pytest.param(path, run, id=f"{path.stem}-{run['id']}") for path in golden_files(pattern) for run in load_case(path).config["runs"]]
    return pytest.mark.parametrize(("path", "run"), runs)


def model_of(case: Case) -> SiT:
    model = SiT(**case.config["model"]).eval()
    model.load_state_dict({name.removeprefix("weights."): t for name, t in case.tensors.items() if name.startswith("weights.")}, strict=True)
    return model


def transport_of(config: dict, run: dict) -> Transport:
    said = config | run
    return create_transport(said["path"], said["prediction"], said.get("loss_weight"), said.get("train_eps"), said.get("sample_eps"))


def guided(case: Case, run: dict, x: Tensor) -> tuple[Tensor, Callable[..., Tensor], dict]:
    """What a sampler is called with; a guided reference walks [x, x] with labels [y, null] and keeps the first half."""
    model, y = model_of(case), case.tensors["in.y"]
    if run.get("cfg_scale") is None:
        return x, model, {"y": y}
    null = torch.full_like(y, case.config["model"]["num_classes"])
    return torch.cat([x, x]), model.forward_with_cfg, {"y": torch.cat([y, null]), "cfg_scale": run["cfg_scale"]}


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()  # false for nan


def tolerance_of(run: dict) -> float:
    return 2e-3 if run["method"] in ADAPTIVE else 1e-4  # adaptive steps follow rounding


@each("sit_forward_*.safetensors")
@torch.no_grad()
def test_forward_and_guidance_equal_the_published_sit(path: Path) -> None:
    case = load_case(path)
    model, t = model_of(case), case.tensors
    assert_equal(model(t["in.x"], t["in.t"], t["in.y"]), t["out.forward"])
    assert_equal(model.forward_with_cfg(t["in.x_cfg"], t["in.t_cfg"], t["in.y_cfg"], case.config["cfg_scale"]), t["out.forward_with_cfg"])


@each("sit_path_*.safetensors")
def test_interpolants_and_conversions_equal_the_published_ones(path: Path) -> None:
    case = load_case(path)
    norm, golden = float(case.config["diffusion_norm"]), case.tensors
    t, x, x_0, v = (golden[f"in.{name}"] for name in ("t", "x", "x0", "v"))
    for name in case.config["paths"]:
        ours = PATHS[name]()
        x_t, velocity = ours.interpolate(t, x_0, x)
        values = {
            "alpha": ours.alpha(t), "sigma": ours.sigma(t), "d_alpha": ours.d_alpha(t), "d_sigma": ours.d_sigma(t), "d_alpha_over_alpha": ours.rate(t),
            "drift_mean": -ours.rate(t).view(-1, 1, 1, 1) * x, "drift_var": ours.gain(t), "xt": x_t, "ut": velocity,
            "velocity_from_score": ours.velocity_from_score(v, x, t), "score_from_velocity": ours.score_from_velocity(v, x, t),
            "noise_from_velocity": ours.noise_from_velocity(v, x, t),
        }  # fmt: skip
        expected = {key.removeprefix(f"out.{name}."): value for key, value in golden.items() if key.startswith(f"out.{name}.")}
        assert set(values) <= set(expected)
        for key, value in expected.items():
            form = key.removeprefix("diffusion.")
            assert_equal(values[key] if key in values else ours.diffusion(t, WORDS.get(form, form), norm), value)


@each("sit_losses_*.safetensors")
@torch.no_grad()
def test_training_losses_equal_the_published_ones(path: Path) -> None:
    case = load_case(path)
    model, t, times = model_of(case), case.tensors, []

    def watched(x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        times.append(time)
        return model(x, time, y)

    for combo in case.config["combos"]:
        terms = transport_of(case.config, combo).training_losses(watched, t["in.x1"], {"y": t["in.y"]}, x_0=t["noise"][0], u=t["in.u"])
        flow = f"{combo['path']}.{combo['prediction']}"
        torch.testing.assert_close(terms["loss"], t[f"out.loss.{flow}.{combo['loss_weight']}"], rtol=1e-4, atol=0)
        assert_equal(terms["pred"], t[f"out.pred.{flow}"])
        assert_equal(times[-1], t[f"out.t.{flow}"])


@each_run("sit_ode_*.safetensors")
def test_ode_samples_equal_the_published_ones(path: Path, run: dict) -> None:
    case = load_case(path)
    x, model, kwargs = guided(case, run, case.tensors[f"in.{run['init']}"])
    calls = []

    def counted(x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        calls.append(t)
        return model(x, t, **kwargs)

    walk = Sampler(transport_of(case.config, run)).sample_ode(run["method"], run["num_steps"], run["atol"], run["rtol"], run["reverse"])
    states = walk(x, counted, **kwargs)[:, : len(case.tensors["in.y"])]
    expected = case.tensors[f"out.{run['id']}"]
    assert_equal(states[-1], expected, tolerance_of(run))
    if f"out.{run['id']}.trajectory" in case.tensors:
        assert_equal(states, case.tensors[f"out.{run['id']}.trajectory"], tolerance_of(run))
    if run["method"] not in ADAPTIVE:
        assert len(calls) == case.tensors[f"out.{run['id']}.nfe"].item()


@each_run("sit_sde_*.safetensors")
def test_sde_samples_equal_the_published_ones(path: Path, run: dict) -> None:
    case = load_case(path)
    x, model, kwargs = guided(case, run, case.tensors["in.x"])
    noise, form = case.tensors[f"noise.{run['id']}"], run["diffusion_form"]
    walk = Sampler(transport_of(case.config, run)).sample_sde(
        run["method"], WORDS.get(form, form), float(run["diffusion_norm"]), run["last_step"], run["last_step_size"], run["num_steps"],
        noise=lambda i, like: noise[i],
    )  # fmt: skip
    states = [state[: len(case.tensors["in.y"])] for state in walk(x, model, **kwargs)]
    assert_equal(states[-1], case.tensors[f"out.{run['id']}"])
    assert_equal(states[-2], case.tensors[f"out.{run['id']}.before_last_step"])


@each_run("sit_likelihood_*.safetensors")
def test_likelihoods_equal_the_published_ones(path: Path, run: dict) -> None:
    case = load_case(path)
    probes = case.tensors[f"noise.{run['id']}"]
    likelihood = Sampler(transport_of(case.config, run)).sample_ode_likelihood(
        run["method"], run["num_steps"], run["atol"], run["rtol"], probe=lambda k, like: probes[0 if run["eps"] == "fixed" else k]
    )
    log_p, z = likelihood(case.tensors["in.x1"], model_of(case), y=case.tensors["in.y"])
    assert_equal(log_p, case.tensors[f"out.{run['id']}.logp"], tolerance_of(run))
    assert_equal(z, case.tensors[f"out.{run['id']}.z"], tolerance_of(run))
