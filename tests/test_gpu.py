"""Checks that need a CUDA device: make test-gpu."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_dit

from dit.inference import prepare_for_inference
from tstitch.diffusion import create_diffusion
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.noise import SampleNoise
from tstitch.sampling import sample
from tstitch.schedule import StitchSchedule
from tstitch.solvers import DDIM, DDPM

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("solver", [DDIM, DDPM])
def test_a_gpu_samples_what_a_cpu_samples(small_and_large, solver) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    for device in ("cpu", "cuda"):
        noise = SampleNoise(range(4))
        denoisers = [model.to(device) for model in small_and_large]
        results.append(
            sample(
                denoisers, noise.latents((4, 8, 8), device), torch.arange(4, device=device), schedule=StitchSchedule.from_ratio(0.5),
                solver=solver(create_diffusion("10")), guidance=ClassifierFreeGuidance(2.0, 10), noise=noise,
            ).cpu()
        )  # fmt: skip
    for model in small_and_large:
        model.cpu()
    assert (results[0] - results[1]).abs().max() < 1e-4 * results[0].abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_is_near_float32(dtype: torch.dtype, tolerance: float) -> None:
    x, t, y = torch.randn(4, 4, 8, 8, device="cuda"), torch.tensor([999, 500, 20, 0], device="cuda"), torch.arange(4, device="cuda")
    with torch.no_grad():
        expected, half = tiny_dit(2).cuda()(x, t, y), tiny_dit(2).cuda().to(dtype)(x, t, y)
    assert (half - expected).abs().max() < tolerance * expected.abs().max()


def test_the_loop_never_waits_for_the_device(small_and_large) -> None:
    denoisers = [model.cuda() for model in small_and_large]
    noise = SampleNoise(range(2))
    x_T, y = noise.latents((4, 8, 8), "cuda"), torch.arange(2, device="cuda")
    settings = {"schedule": StitchSchedule.from_ratio(0.5), "solver": DDIM(create_diffusion("10")), "guidance": ClassifierFreeGuidance(2.0, 10)}
    sample(denoisers, x_T, y, **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(denoisers, x_T, y, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for model in denoisers:
            model.cpu()


@pytest.mark.parametrize("compiled", [False, True])
def test_prepared_models_in_turn_are_the_functions_they_were_made_of(small_and_large, compiled: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    models = [model.cuda() for model in small_and_large]
    prepared = [prepare_for_inference(model, (500, 20), compile=compiled) for model in models]
    x, y = torch.randn(4, 4, 8, 8, device="cuda"), torch.arange(4, device="cuda")
    with torch.no_grad():
        for t in (500, 20, 500, 7):  # the second model's graph must not write into the first one's answer
            times = torch.full((4,), t, device="cuda")
            answers = [model(x, times, y) for model in prepared]
            for model, answer in zip(models, answers, strict=True):
                assert (answer - model(x, times, y)).abs().max() < 1e-5
    for model in models:
        model.cpu()
