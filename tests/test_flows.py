"""Stitched flows: the ends of a schedule are the single models, evaluations are those that happen, and a sample depends on its seed alone."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import redraw_weights
from torch import Tensor
from torchdiffeq import odeint

from sit import flows
from sit.bridge import Bridge, Diffusion, Flow
from sit.flows import ODEWalker, SDEWalker
from sit.models import SiT
from sit.transport import ODE, PATHS, PREDICTIONS, SDE, Sampler, create_transport
from sit.transport.ode import ONE_STEP
from tstitch.errors import InputError
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.noise import SampleNoise
from tstitch.schedule import StitchSchedule

RATIOS = [StitchSchedule.from_ratio(ratio) for ratio in (0.0, 0.3, 0.5, 1.0)]
METHODS = [*ONE_STEP, "explicit_adams", "dopri5", "bosh3"]


def tiny_sit(seed: int, width: int = 32, patch_size: int = 2, std: float = 0.05) -> SiT:
    return redraw_weights(SiT(input_size=8, patch_size=patch_size, hidden_size=width, depth=1, num_heads=4, num_classes=10), seed, std)


class Counted:
    """A model that counts how often it is called."""

    def __init__(self, model: SiT) -> None:
        self.model, self.latent_shape, self.calls = model, model.latent_shape, 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.model(x, t, y)


@pytest.fixture(scope="module")
def models() -> list[SiT]:
    return [tiny_sit(1, width=16, patch_size=4), tiny_sit(2)]


def start(n: int = 3) -> tuple[Tensor, Tensor, SampleNoise]:
    noise = SampleNoise(range(n))
    return noise.latents((4, 8, 8)), torch.arange(n) % 10, noise


def walker_of(method: str, path: str = "Linear", prediction: str = "velocity", **words: object) -> ODEWalker | SDEWalker:
    transport = create_transport(path, prediction)
    if method in ("Euler", "Heun"):
        return SDEWalker(SDE(transport, method, "sigma", num_steps=9, **words))
    return ODEWalker(ODE(transport, method, num_steps=9, **words), alone=False)


@pytest.mark.parametrize("method", METHODS)
def test_at_the_ends_of_the_front_a_stitched_ode_is_the_single_model(models: list[SiT], method: str) -> None:
    x, y, _ = start()
    walker = walker_of(method)
    walked = walker.walk(models, x, y, schedules=[RATIOS[0], RATIOS[-1]], guidance=None)
    for latents, model in zip(walked.latents, reversed(models), strict=True):
        single = Sampler(walker.transport).sample_ode(method, 9)(x, model, y=y)[-1]
        torch.testing.assert_close(latents, single, atol=1e-5, rtol=1e-5)
        assert (latents - x).abs().max() > 0.1


@pytest.mark.parametrize("method", ["Euler", "Heun"])
@pytest.mark.parametrize("last_step", ["Mean", "Tweedie", "None"])
def test_at_the_ends_of_the_front_a_stitched_sde_is_the_single_model(models: list[SiT], method: str, last_step: str) -> None:
    x, y, noise = start()
    walker = SDEWalker(SDE(create_transport(sample_eps=1e-3), method, "sigma", last_step=last_step, num_steps=9))
    walked = walker.walk(models, x, y, schedules=[RATIOS[0], RATIOS[-1]], guidance=None, noise=noise)
    for latents, model in zip(walked.latents, reversed(models), strict=True):
        states = Sampler(walker.transport).sample_sde(method, "sigma", last_step=last_step, num_steps=9, noise=noise)(x, model, y=y)
        torch.testing.assert_close(latents, states[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [*METHODS, "Euler", "Heun"])
def test_the_evaluations_that_are_reported_are_those_that_happened(models: list[SiT], method: str) -> None:
    x, y, noise = start()
    walker = walker_of(method)
    counted = [Counted(model) for model in models]
    together = walker.walk(counted, x, y, schedules=RATIOS, guidance=None, noise=noise)
    if (work := walker.work(RATIOS, 2)) is not None:
        assert work == [model.calls for model in counted]
    for k, schedule in enumerate(RATIOS):
        counted = [Counted(model) for model in models]
        alone = walker.walk(counted, x, y, schedules=[schedule], guidance=None, noise=noise)
        assert alone.evaluations[0] == together.evaluations[k] == [model.calls for model in counted]
        assert torch.equal(alone.latents[0], together.latents[k])  # a shared beginning changes nothing


def test_evaluations_of_samples_walked_alone_are_their_mean(models: list[SiT]) -> None:
    x, y, _ = start(3)
    x[1] *= 4  # so that samples need unequal numbers
    walker = ODEWalker(ODE(create_transport(), "dopri5"))
    single = [walker.walk(models, x[i : i + 1], y[i : i + 1], schedules=RATIOS, guidance=None).evaluations for i in range(3)]
    counted = [Counted(model) for model in models]
    spent = [0.0, 0.0]

    def add(k: int, evaluations: float) -> None:
        spent[k] += evaluations

    walked = walker.walk(counted, x, y, schedules=RATIOS, guidance=None, callback=add)
    torch.testing.assert_close(torch.tensor(walked.evaluations), torch.tensor(single, dtype=torch.float32).mean(dim=0))
    assert spent == pytest.approx([model.calls / 3 for model in counted])
    assert len({tuple(rows[0]) for rows in single}) > 1


@pytest.mark.parametrize("method", ["heun2", "dopri5", "Heun"])
def test_guidance_is_asked_from_the_first_evaluation_to_the_last(models: list[SiT], method: str) -> None:
    x, y, noise = start(1)
    asked: list[float] = []

    def guidance(denoiser: SiT, x: Tensor, t: Tensor, y: Tensor, progress: float) -> Tensor:
        asked.append(progress)
        return denoiser(x, t, y)

    guidance.interval = (0.2, 0.8)
    walker_of(method).walk(models, x, y, schedules=[RATIOS[1]], guidance=guidance, noise=noise)
    assert asked[0] == 0 and 0.9 < max(asked) < 1 and 0.2 < sorted(asked)[len(asked) // 2] < 0.8


def test_the_seconds_of_an_evaluation_are_a_step_s_by_its_evaluations(models: list[SiT], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts model calls, every method's evaluation takes one call a batch."""
    counted = [Counted(model) for model in models]

    def count(calls: list, device: torch.device, repeats: int) -> list[float]:
        seconds = []
        for call in calls:
            before = sum(model.calls for model in counted)
            call()
            seconds.append(sum(model.calls for model in counted) - before)
        return seconds

    monkeypatch.setattr(flows, "measure_seconds", count)
    x, y, noise = start(3)
    for method in ("euler", "heun2", "rk4", "explicit_adams", "dopri5", "Euler", "Heun"):
        assert walker_of(method).evaluation_seconds(counted, x, y, guidance=None, noise=noise) == [1, 1]
    alone = ODEWalker(ODE(create_transport(), "dopri5"))
    assert alone.evaluation_seconds(counted, x, y, guidance=None, noise=noise) == [3, 3]  # one after the other


@pytest.mark.parametrize("method", ONE_STEP)
def test_our_one_step_methods_are_the_library_s(models: list[SiT], method: str) -> None:
    x, y, _ = start(2)
    ode = ODE(create_transport("GVP"), method, num_steps=7)
    drift = ode.drift(models[1], y=y)
    with torch.no_grad():
        torch.testing.assert_close(torch.stack([x, *ode.states(drift, x, ode.grid)]), odeint(drift, x, ode.grid, method=method), atol=1e-5, rtol=1e-5)


def test_a_defect_of_a_model_is_not_taken_for_one_of_the_tolerances() -> None:
    def broken(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("my own")

    x, y, _ = start(1)
    with pytest.raises(AssertionError, match="my own"):
        walker_of("dopri5").walk([broken], x, y, schedules=[StitchSchedule((1.0,))], guidance=None)


def test_a_fixed_step_method_gives_each_model_its_share_of_the_steps(models: list[SiT]) -> None:
    x, y, _ = start(1)
    walker = ODEWalker(ODE(create_transport(), "heun3", num_steps=11))
    assert walker.walk(models, x, y, schedules=RATIOS, guidance=None).evaluations == [[0, 30], [9, 21], [15, 15], [30, 0]]


def test_an_adaptive_method_hands_over_at_a_point_in_time(models: list[SiT]) -> None:
    x, y, _ = start(2)
    seen: list[list[float]] = [[], []]

    def spying(k: int) -> Counted:
        return type("Spy", (), {"__call__": lambda self, x, t, y: (seen[k].append(float(t[0])), models[k](x, t, y))[1]})()

    walker = walker_of("dopri5")
    walker.walk([spying(0), spying(1)], x, y, schedules=[StitchSchedule.from_ratio(0.3)], guidance=None)
    assert seen[0][0] == 0 and seen[1][0] == pytest.approx(0.3)
    assert min(seen[1]) >= 0.3 - 1e-6


@pytest.mark.parametrize("method", ["heun2", "dopri5", "Euler"])
def test_a_sample_does_not_depend_on_its_batch(models: list[SiT], method: str) -> None:
    x, y, noise = start(3)
    walker = walker_of(method) if method == "Euler" else ODEWalker(ODE(create_transport(), method, num_steps=9))
    whole = walker.walk(models, x, y, schedules=RATIOS, guidance=None, noise=noise, max_batch=2)
    for i in range(3):
        single = walker.walk(models, x[i : i + 1], y[i : i + 1], schedules=RATIOS, guidance=None, noise=SampleNoise([i]))
        for a, b in zip(whole.latents, single.latents, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, atol=2e-4, rtol=1e-4)


def test_guidance_is_that_of_forward_with_cfg(models: list[SiT]) -> None:
    x, y, _ = start(2)
    guidance = ClassifierFreeGuidance(3.0, 10, 3)
    ours = walker_of("euler").walk(models, x, y, schedules=[RATIOS[0]], guidance=guidance).latents[0]
    walk = Sampler(create_transport()).sample_ode("euler", 9)
    published = walk(torch.cat([x, x]), models[1].forward_with_cfg, y=torch.cat([y, torch.full_like(y, 10)]), cfg_scale=3.0)[-1][:2]
    torch.testing.assert_close(ours, published, atol=1e-5, rtol=1e-5)


def test_three_models_and_models_that_come_back(models: list[SiT]) -> None:
    x, y, _ = start(1)
    three = [*models, tiny_sit(3)]
    schedules = [StitchSchedule((0.25, 0.25, 0.5)), StitchSchedule((0.25, 0.5, 0.25), order=(0, 1, 0))]
    assert walker_of("midpoint").walk(three, x, y, schedules=schedules, guidance=None).evaluations == [[4, 4, 8], [8, 8, 0]]
    with pytest.raises(InputError, match="needs 3 denoisers"):
        walker_of("dopri5").walk(models, x, y, schedules=schedules[:1], guidance=None)
    with pytest.raises(InputError, match="fractions"):
        walker_of("dopri5").walk(models, x, y, schedules=[StitchSchedule.from_thresholds([1.0])], guidance=None)


class ExactNoise:
    """The best prediction of the noise in x_t for data N(mean, spread^2), told a process's own time; a DiT's if `process` is Diffusion."""

    latent_shape = (4, 8, 8)
    mean, spread = 0.3, 0.5

    def __init__(self, process: Diffusion | Flow) -> None:
        self.process = process

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if isinstance(self.process, Flow):
            alpha, sigma = self.process.transport.path.alpha(t), self.process.transport.path.sigma(t)
        else:
            table = self.process.log_ratios
            ratio = (table[t.floor().long()] + (t - t.floor()) * (table[t.ceil().long()] - table[t.floor().long()])).float()
            alpha, sigma = torch.sigmoid(2 * ratio).sqrt(), torch.sigmoid(-2 * ratio).sqrt()
        alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        noise = sigma * (x - alpha * self.mean) / (alpha**2 * self.spread**2 + sigma**2)
        if isinstance(self.process, Diffusion):
            return torch.cat([noise, torch.zeros_like(noise)], dim=1)  # with a variance, as a DiT answers
        velocity = self.process.transport.path.velocity_from_noise(noise, x, t.float())
        return self.process.transport.output(velocity, x, t)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("source", ["DiT", "Linear noise", "VP score", "GVP velocity"])
def test_a_carried_over_model_predicts_what_the_flow_s_own_would(path: str, source: str) -> None:
    """The exact model of Gaussian data on its own process, carried over, is the exact model of the same data on the flow."""
    process = Diffusion() if source == "DiT" else Flow(create_transport(*source.split()))
    for prediction in PREDICTIONS:
        transport = create_transport(path, prediction)
        bridge = Bridge(ExactNoise(process), process, transport)
        x, y, _ = start(1)
        for t in (0.1, 0.4, 0.7, 0.95):
            time = torch.full((1,), t)
            expected = ExactNoise(Flow(transport))(x, time, y)
            torch.testing.assert_close(bridge(x, time, y), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("method", ["heun2", "dopri5"])
@pytest.mark.parametrize("path", PATHS)
def test_a_dit_walks_a_flow_from_end_to_end(path: str, method: str) -> None:
    """At the ends, where the flow's noise levels are past those that a DiT knows, it is asked at the nearest that it knows."""
    x, y, _ = start(1)
    transport = create_transport(path)
    bridge = Bridge(ExactNoise(Diffusion()), Diffusion(), transport)
    ode = ODE(transport, method, num_steps=300)
    walked = ODEWalker(ode).walk([bridge], x, y, schedules=[StitchSchedule((1.0,))], guidance=None)
    alpha, sigma = transport.path.alpha(ode.grid[:1]), transport.path.sigma(ode.grid[:1])
    start_spread = (alpha**2 * ExactNoise.spread**2 + sigma**2).sqrt()  # of VP the start is not quite all noise
    exact = ExactNoise.mean + ExactNoise.spread * (x - alpha * ExactNoise.mean) / start_spread  # the flow maps N(0, 1) to N(mean, spread^2)
    torch.testing.assert_close(walked.latents[0], exact, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("path", PATHS)
def test_a_carried_over_dit_is_finite_at_both_ends(path: str) -> None:
    x, y, _ = start(2)
    bridge = Bridge(ExactNoise(Diffusion()), Diffusion(), create_transport(path))
    assert bridge(x, torch.tensor([0.0, 1.0]), y).isfinite().all()


def test_places_are_where_the_noise_level_is_the_asked_one() -> None:
    log_ratio = torch.linspace(-3, 3, 7)
    for process in (Diffusion(), *(Flow(create_transport(path)) for path in PATHS)):
        place = process.place(log_ratio)
        torch.testing.assert_close(place.alpha.log() - place.sigma.log(), log_ratio, atol=1e-3, rtol=1e-3)
        assert (place.t.diff() < 0).all() if isinstance(process, Diffusion) else (place.t.diff() > 0).all()
    assert Diffusion().place(torch.tensor([-math.inf, math.inf])).t.tolist() == [999, 0]
