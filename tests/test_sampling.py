"""Laws of sampling: solvers against closed forms, sweeps against single runs, samples against their batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_dit
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from dit.models import attend
from tstitch import sweep
from tstitch.diffusion import GaussianDiffusion, create_diffusion, named_betas
from tstitch.errors import InputError
from tstitch.guidance import AutoGuidance, ClassifierFreeGuidance
from tstitch.noise import SampleNoise
from tstitch.sampling import sample
from tstitch.schedule import StitchSchedule, three_way_allocations, two_way_ratios
from tstitch.solvers import DDIM, DDPM, DPMSolverPP, create_solver
from tstitch.sweep import BatchSize, count_evaluations, sample_many
from tstitch.walker import SolverWalker

DATA_STD = 0.5
SOLVERS = {"ddim": lambda d: DDIM(d), "ddim_eta": lambda d: DDIM(d, eta=0.7), "ddpm": lambda d: DDPM(d), "dpm++": lambda d: DPMSolverPP(d)}


def gaussian_eps(mean: float = 0.3):
    """The exact noise prediction for data N(mean, DATA_STD^2): eps = sqrt(1 - abar) (x - sqrt(abar) mean) / (abar s^2 + 1 - abar)."""
    abar = torch.from_numpy(create_diffusion("").alphas_cumprod)

    def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        a = abar[t].to(x.dtype).view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * DATA_STD**2 + 1 - a)

    return denoiser


def exact_flow(x_T: Tensor, diffusion, index: int | None = None, mean: float = 0.3) -> Tensor:
    """The probability-flow ODE keeps (x - sqrt(abar) mean) / std_t; its value at a process index, or at the data."""

    def mean_and_std(abar: float) -> tuple[float, float]:
        return math.sqrt(abar) * mean, math.sqrt(abar * DATA_STD**2 + 1 - abar)

    start, std_start = mean_and_std(diffusion.alphas_cumprod[-1])
    end, std_end = mean_and_std(1.0 if index is None else diffusion.alphas_cumprod[index])
    return end + std_end * (x_T - start) / std_start


def flow_error(make_solver, timesteps: list[int] | None = None, at_data: bool = True) -> float:
    """Largest error at the data, or before the last step, whose jump to zero noise is of first order for every solver."""
    diffusion = GaussianDiffusion(named_betas("linear", 1000), timesteps, learn_sigma=False)
    x_T = torch.linspace(-2, 2, 16, dtype=torch.float64).view(16, 1, 1, 1)
    seen = []
    x_0 = sample(
        [gaussian_eps()], x_T, torch.zeros(16, dtype=torch.long), schedule=StitchSchedule((1.0,)), solver=make_solver(diffusion),
        callback=lambda progress: seen.append(progress.x),
    )  # fmt: skip
    error = x_0 - exact_flow(x_T, diffusion) if at_data else seen[-2] - exact_flow(x_T, diffusion, 0)
    return error.abs().max().item()


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_deterministic_solvers_converge_to_the_closed_form_of_gaussian_data(name: str) -> None:
    assert flow_error(SOLVERS[name]) < 4e-3


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm++", 2)])
def test_solvers_have_their_order(name: str, order: int) -> None:
    errors = [flow_error(SOLVERS[name], list(range(20, 901, stride)), at_data=False) for stride in (20, 10, 5)]
    orders = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert all(order - 0.3 < measured < order + 0.6 for measured in orders), orders


def test_the_multistep_solver_equals_the_library_s() -> None:
    diffusion = create_diffusion("12", learn_sigma=False)
    library = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, solver_order=2, algorithm_type="dpmsolver++", final_sigmas_type="zero")
    library.set_timesteps(timesteps=DPMSolverPP(diffusion).timesteps)
    x_T = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, denoiser = x_T, gaussian_eps()
    for t in library.timesteps:
        x = library.step(denoiser(x, t.expand(3), None), t, x).prev_sample
    ours = sample([denoiser], x_T, torch.zeros(3, dtype=torch.long), schedule=StitchSchedule((1.0,)), solver=DPMSolverPP(diffusion))
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)  # the library's tables are float32


@pytest.mark.parametrize("length", [16, 64, 256, 320])
def test_attention_in_bfloat16_is_that_of_float32(length: int) -> None:
    q, k, v = torch.randn(3, 2, 4, length, 40, generator=torch.Generator().manual_seed(0)).unbind()
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["ddpm", "ddim_eta"])
def test_stochastic_solvers_reach_the_data_distribution(name: str) -> None:
    diffusion = create_diffusion("250", learn_sigma=False)
    noise = SampleNoise(range(2000))
    x_0 = sample(
        [gaussian_eps()], noise.latents((1, 2, 2)), torch.zeros(2000, dtype=torch.long), schedule=StitchSchedule((1.0,)),
        solver=SOLVERS[name](diffusion), noise=noise,
    )  # fmt: skip
    assert abs(x_0.mean().item() - 0.3) < 0.03
    assert abs(x_0.std().item() - DATA_STD) < 0.03


def test_ddpm_without_a_learned_variance_adds_noise_of_variance_beta() -> None:
    diffusion = create_diffusion("10", learn_sigma=False)
    solver = DDPM(diffusion)
    x, eps, noise = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    for i in range(9):  # the last step adds none
        added = solver.step(x, i, eps, noise, ()).x - solver.step(x, i, eps, torch.zeros_like(noise), ()).x
        torch.testing.assert_close(added, diffusion.betas[9 - i] ** 0.5 * noise, atol=1e-6, rtol=1e-6)
    assert torch.equal(solver.step(x, 9, eps, noise, ()).x, solver.step(x, 9, eps, torch.zeros_like(noise), ()).x)


def test_ddim_with_the_exact_noise_lands_on_x_0() -> None:
    diffusion = create_diffusion("10")
    x_0, eps = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    x_T = diffusion.q_sample(x_0, torch.tensor([9, 9]), eps)
    out = sample([lambda x, t, y: eps], x_T, torch.zeros(2, dtype=torch.long), schedule=StitchSchedule((1.0,)), solver=DDIM(diffusion))
    torch.testing.assert_close(out, x_0)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("models", ["small_and_large", "three_denoisers"])
def test_a_sweep_gives_what_each_schedule_gives_alone(request: pytest.FixtureRequest, models: str, name: str, guided: bool) -> None:
    denoisers = request.getfixturevalue(models)
    schedules = two_way_ratios() if len(denoisers) == 2 else [*three_way_allocations(4), StitchSchedule((0.2, 0.6, 0.2), order=(0, 2, 1))]
    noise, y = SampleNoise(range(3)), torch.tensor([1, 5, 9])
    settings = {
        "solver": SOLVERS[name](create_diffusion("10")), "guidance": ClassifierFreeGuidance(2.0, 10) if guided else None, "noise": noise,
    }  # fmt: skip
    x_T = noise.latents((4, 8, 8))
    together = sample_many(denoisers, x_T, y, schedules=schedules, max_batch=7, **settings)
    for schedule, x_0 in zip(schedules, together, strict=True):
        alone = sample(denoisers, x_T, y, schedule=schedule, **settings)
        assert (x_0 - alone).abs().max() < 1e-4 * alone.abs().max().clamp(min=1), schedule


def test_ratio_one_is_the_small_model_alone_and_ratio_zero_the_large(small_and_large) -> None:
    noise, y, solver = SampleNoise([0, 1]), torch.tensor([3, 4]), DDIM(create_diffusion("7"))
    for ratio, model in ((1.0, small_and_large[0]), (0.0, small_and_large[1])):
        stitched = sample(small_and_large, noise.latents((4, 8, 8)), y, schedule=StitchSchedule.from_ratio(ratio), solver=solver)
        alone = sample([model], noise.latents((4, 8, 8)), y, schedule=StitchSchedule((1.0,)), solver=solver)
        assert torch.equal(stitched, alone)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch(small_and_large, name: str) -> None:
    seeds, labels = list(range(8)), torch.arange(8)
    results = []
    for batch in (1, 3, 8):
        parts = []
        for start in range(0, 8, batch):
            noise = SampleNoise(seeds[start : start + batch])
            parts.append(
                sample(
                    small_and_large, noise.latents((4, 8, 8)), labels[start : start + batch], schedule=StitchSchedule.from_ratio(0.5),
                    solver=SOLVERS[name](create_diffusion("10")), guidance=ClassifierFreeGuidance(2.0, 10), noise=noise,
                )
            )  # fmt: skip
        results.append(torch.cat(parts))
    largest = results[0].abs().max()
    assert (results[0] - results[1]).abs().max() < 1e-5 * largest
    assert (results[0] - results[2]).abs().max() < 1e-5 * largest


def test_noise_depends_on_seed_and_step_alone() -> None:
    like = torch.empty(3, 4, 8, 8)
    noise = SampleNoise([3, 4, 5])
    assert torch.equal(noise(7, like)[1:2], SampleNoise([4])(7, like[:1]))
    assert not torch.equal(noise(7, like), noise(8, like))
    assert torch.equal(noise.latents((4, 8, 8)), noise(-1, like))
    assert abs(SampleNoise(range(4000)).latents((4, 4, 4)).std().item() - 1) < 0.01
    assert SampleNoise([2]).labels(1000).equal(SampleNoise([1, 2]).labels(1000)[1:])
    counts = SampleNoise(range(5000)).labels(10).bincount(minlength=10)
    assert counts.min() > 400 and counts.max() < 600


def test_a_sweep_walks_shared_prefixes_once(small_and_large) -> None:
    calls = [0, 0]

    def counted(k: int):
        def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            calls[k] += len(x)
            return small_and_large[k](x, t, y)

        return denoiser

    solver, schedules = DDIM(create_diffusion("10")), two_way_ratios()
    sample_many([counted(0), counted(1)], torch.randn(2, 4, 8, 8), torch.tensor([0, 1]), schedules=schedules, solver=solver)
    # 11 runs of 10 steps would be 55 small and 55 large evaluations for each sample.
    assert calls == [2 * n for n in count_evaluations(schedules, solver, 2)] == [2 * 10, 2 * 55]


def test_max_batch_bounds_every_call() -> None:
    largest = 0

    def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(x))
        return torch.zeros_like(x)

    x_T, y = torch.randn(4, 1, 2, 2), torch.zeros(4, dtype=torch.long)
    sample_many([denoiser, denoiser], x_T, y, schedules=two_way_ratios(), solver=DDIM(create_diffusion("10", learn_sigma=False)), max_batch=5)
    assert largest == 5


def test_a_measured_batch_gives_what_each_schedule_gives_alone_and_computes_nothing_twice(small_and_large) -> None:
    calls = [0, 0]

    def counted(k: int):
        def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            calls[k] += len(x)
            return small_and_large[k](x, t, y)

        return denoiser

    noise, y, schedules = SampleNoise(range(3)), torch.tensor([1, 5, 9]), two_way_ratios()
    settings = {"solver": DDIM(create_diffusion("10")), "noise": noise}
    x_T, denoisers = noise.latents((4, 8, 8)), [counted(0), counted(1)]
    sizes = [BatchSize(None, x_T.device) for _ in denoisers]
    together = sample_many(denoisers, x_T, y, schedules=schedules, max_batch=sizes, **settings)
    assert calls == [3 * 10, 3 * 55]
    assert sizes[0].size == 8  # the small model never has as many samples
    for schedule, x_0 in zip(schedules, together, strict=True):
        alone = sample(small_and_large, x_T, y, schedule=schedule, **settings)
        assert (x_0 - alone).abs().max() < 1e-4 * alone.abs().max().clamp(min=1), schedule


@pytest.mark.parametrize("given", [5, None])
def test_a_walk_says_how_many_samples_shared_a_call(small_and_large, given: int | None) -> None:
    noise, made = SampleNoise(range(3)), []
    denoisers = [lambda x, t, y, model=model: made.append(len(x)) or model(x, t, y) for model in small_and_large]
    walked = SolverWalker(DDIM(create_diffusion("4"))).walk(
        denoisers, noise.latents((4, 8, 8)), torch.tensor([1, 5, 9]), schedules=two_way_ratios(), guidance=None, noise=noise, max_batch=given
    )
    assert walked.max_batch == [5, 5] if given else all(size in made + [8] for size in walked.max_batch)


def calls_of_sizes(seconds: Callable[[int], float], monkeypatch: pytest.MonkeyPatch, rows: int, rounds: int) -> tuple[BatchSize, list[int]]:
    """Sizes of the calls that a measured batch makes of `rows` samples, `rounds` times, where a call of n takes seconds(n)."""
    clock, made = [0.0], []
    monkeypatch.setattr(sweep.time, "process_time", lambda: clock[0])

    def call(x: Tensor, y: Tensor) -> Tensor:
        clock[0] += seconds(len(x))
        made.append(len(x))
        return x + 1

    size, x = BatchSize(None, torch.device("cpu")), torch.randn(rows, 2)
    for _ in range(rounds):
        assert torch.equal(size.run(call, x, torch.zeros(rows)), x + 1)
    return size, made


def test_a_batch_becomes_the_fastest_and_trying_costs_two_calls_of_each_other_size(monkeypatch: pytest.MonkeyPatch) -> None:
    size, made = calls_of_sizes(lambda n: 1 + 0.1 * n if n <= 32 else 0.2 * n, monkeypatch, rows=200, rounds=4)
    assert size.size == 32 and made[:8] == [8, 8, 16, 16, 32, 32, 64, 24] and made[-7:] == [32] * 6 + [8]
    assert made.count(64) == 2
    size, made = calls_of_sizes(lambda n: n**1.5, monkeypatch, rows=20, rounds=9)
    assert size.size == 1 and made.count(16) == 2 and made[-20:] == [1] * 20
    size, made = calls_of_sizes(lambda n: float(n), monkeypatch, rows=100, rounds=4)
    assert size.size == 8 and made[-13:] == [8] * 12 + [4]  # no other is faster
    size, made = calls_of_sizes(lambda n: 1.0, monkeypatch, rows=1000, rounds=3)
    assert size.size == max(made) == 64
    size, made = calls_of_sizes(lambda n: 1.0, monkeypatch, rows=7, rounds=3)
    assert made == [7, 7, 7]


def test_a_measured_batch_stays_within_memory_and_a_given_one_says_that_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def little_memory(n: int) -> float:
        if n > 11:
            raise torch.OutOfMemoryError("no")
        return 1.0

    size, made = calls_of_sizes(little_memory, monkeypatch, rows=40, rounds=4)
    assert size.size == 8 and max(made) == 8 and made.count(4) == 2
    monkeypatch.undo()
    with pytest.raises(torch.OutOfMemoryError):
        BatchSize(12, torch.device("cpu")).run(lambda x, y: x * little_memory(len(x)), torch.randn(12, 1), torch.zeros(12))
    with pytest.raises(InputError, match="at least 1"):
        BatchSize(0, torch.device("cpu"))


def test_guidance_scale_one_is_the_conditional_prediction_and_costs_one_call(small_and_large) -> None:
    seen = []

    def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(len(x))
        return small_and_large[1](x, t, y)

    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.tensor([1, 2])
    assert torch.equal(ClassifierFreeGuidance(1.0, 10)(denoiser, x, t, y, 0.0), small_and_large[1](x, t, y))
    assert seen == [2]


def test_guidance_interval_leaves_the_other_steps_unguided(small_and_large) -> None:
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.tensor([1, 2])
    guide = ClassifierFreeGuidance(3.0, 10, interval=(0.25, 0.75))
    plain = small_and_large[1](x, t, y)
    assert torch.equal(guide(small_and_large[1], x, t, y, 0.0), plain)
    assert torch.equal(guide(small_and_large[1], x, t, y, 0.75), plain)
    assert not torch.equal(guide(small_and_large[1], x, t, y, 0.5), plain)


def test_guiding_all_channels_moves_the_fourth_one_too(small_and_large) -> None:
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.tensor([1, 2])
    three = ClassifierFreeGuidance(3.0, 10)(small_and_large[1], x, t, y, 0.0)
    every = ClassifierFreeGuidance(3.0, 10, channels=None)(small_and_large[1], x, t, y, 0.0)
    plain = small_and_large[1](x, t, y)
    torch.testing.assert_close(three[:, :3], every[:, :3])
    torch.testing.assert_close(three[:, 3:], plain[:, 3:])
    torch.testing.assert_close(every[:, 4:], plain[:, 4:])  # the variance is never guided
    assert (every[:, 3] - plain[:, 3]).abs().max() > 1e-3


def test_autoguidance_extrapolates_from_the_weak_to_the_strong_model(small_and_large) -> None:
    small, large = small_and_large
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.tensor([1, 2])
    out = AutoGuidance(small, 2.0)(large, x, t, y, 0.0)
    torch.testing.assert_close(out[:, :4], 2 * large(x, t, y)[:, :4] - small(x, t, y)[:, :4])
    assert torch.equal(AutoGuidance(small, 2.0)(small, x, t, y, 0.0), small(x, t, y))


def test_each_denoiser_can_have_its_own_guidance(small_and_large) -> None:
    noise, y = SampleNoise([0, 1]), torch.tensor([3, 4])
    settings = {"schedule": StitchSchedule.from_ratio(0.5), "solver": DDIM(create_diffusion("4"))}
    guide = ClassifierFreeGuidance(3.0, 10)
    mixed = sample(small_and_large, noise.latents((4, 8, 8)), y, guidance=[None, guide], **settings)
    both = sample(small_and_large, noise.latents((4, 8, 8)), y, guidance=guide, **settings)
    assert not torch.allclose(mixed, both)
    with pytest.raises(InputError, match="for each"):
        sample(small_and_large, noise.latents((4, 8, 8)), y, guidance=[guide], **settings)


def test_half_precision_weights_take_and_give_float32() -> None:
    model, x, t, y = tiny_dit(2), torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.tensor([1, 2])
    expected = model(x, t, y)
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        out = tiny_dit(2).to(dtype)(x, t, y)
        assert out.dtype == torch.float32
        assert (out - expected).abs().max() < tolerance * expected.abs().max()


def test_what_cannot_be_sampled_is_refused(small_and_large) -> None:
    x, y = torch.randn(1, 4, 8, 8), torch.tensor([0])
    with pytest.raises(InputError, match="needs 3 denoisers"):
        sample(small_and_large, x, y, schedule=StitchSchedule((0.2, 0.3, 0.5)), solver=DDIM(create_diffusion("4")))
    with pytest.raises(InputError, match="choose from ddpm, ddim"):
        create_solver("dimm", create_diffusion("4"))
    with pytest.raises(ValueError, match="stochastic"):
        sample(small_and_large, x, y, schedule=StitchSchedule.from_ratio(0.5), solver=DDPM(create_diffusion("4")))
