"""Laws of ODEs, likelihoods and SDEs on problems whose answers are known: Gaussian data, a point mass, and linear differential equations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from gaussian_flow import MEAN, STD, TIGHT, carried, each_flow, gaussian, moments, points, sampler
from torch import Tensor

from sit.transport import DIFFUSION_FORMS, LAST_STEPS, ODE_METHODS, PATHS, SDE_METHODS, Sampler, Transport, create_transport
from sit.transport.ode import ADAPTIVE

# --- ordinary differential equations ---

A, B = 1.3, 2.0


def linear_field(x: Tensor, t: Tensor) -> Tensor:
    return A * x + B * t.view(-1, 1)


def solution(x: Tensor) -> Tensor:
    """Value at t = 1 of dx/dt = A x + B t."""
    return (x + B / A**2) * math.exp(A) - B / A - B / A**2


def linear_error(method: str, num_steps: int, **tolerances: float) -> float:
    end = sampler().sample_ode(method, num_steps, **tolerances)(points(), linear_field)[-1]
    return (end - solution(points())).abs().max().item()


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4), ("explicit_adams", 4)])
def test_fixed_step_methods_have_their_order(method: str, order: int) -> None:
    errors = [linear_error(method, steps + 1) for steps in (20, 40, 80)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert orders == pytest.approx([order, order], abs=0.2)


@pytest.mark.parametrize("method", ["implicit_adams", "fixed_adams"])
@pytest.mark.filterwarnings("ignore:Functional iteration")
def test_implicit_adams_methods_have_at_least_order_four(method: str) -> None:
    # They start with Runge-Kutta steps of order 4 and grow their own with their memory; measured 5.
    coarse, fine = (linear_error(method, steps + 1, atol=1e-12, rtol=1e-10) for steps in (10, 40))
    assert coarse < 1e-3
    assert math.log2(coarse / fine) / 2 > 4


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods_reach_their_tolerance_whatever_it_is(method: str) -> None:
    scale = 512 if method == "fehlberg2" else 20  # its estimate of a step's error is 1/512 of a difference that is no smaller than the error
    for rtol in (1e-3, 1e-5):
        assert linear_error(method, 2, atol=rtol / 10, rtol=rtol) < scale * rtol


@pytest.mark.parametrize("method", [m for m in ODE_METHODS if m != "euler"])
def test_reverse_comes_back(method: str) -> None:
    settings = {"num_steps": 41, "atol": 1e-6, "rtol": 1e-5}
    there = sampler().sample_ode(method, **settings)(points(), linear_field)[-1]
    back = sampler().sample_ode(method, reverse=True, **settings)(there, linear_field)[-1]
    torch.testing.assert_close(back, points(), atol=3e-3, rtol=0)


@each_flow
@pytest.mark.parametrize("reverse", [False, True])
def test_the_flow_of_gaussian_data_is_the_exact_map(path: str, prediction: str, reverse: bool) -> None:
    transport = create_transport(path, prediction)
    states = Sampler(transport).sample_ode("dopri5", 3, reverse=reverse, **TIGHT)(points(), gaussian(transport))
    assert torch.equal(states[0], points())
    torch.testing.assert_close(states[-1], carried(transport, points(), *transport.interval(reverse=reverse)), atol=1e-6, rtol=1e-6)


# Past t = 1 the noise model of VP has no sigma; the still start of GVP's way back makes a long first step look safe.
@pytest.mark.parametrize(("path", "prediction"), [("VP", "noise"), ("GVP", "velocity")])
@pytest.mark.parametrize("method", ODE_METHODS)
def test_a_model_is_never_asked_beyond_the_interval(path: str, prediction: str, method: str) -> None:
    transport, asked = create_transport(path, prediction), []

    def model(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t[0].item())
        return gaussian(transport)(x, t)

    for reverse in (False, True):
        Sampler(transport).sample_ode(method, 4, reverse=reverse)(points().float(), model)
        first, last = sorted(transport.interval(reverse=reverse))
        assert first - 1e-6 <= min(asked) <= max(asked) <= last + 1e-6
        asked.clear()


# --- likelihood ---


@each_flow
def test_the_likelihood_of_gaussian_data_is_the_closed_form(path: str, prediction: str) -> None:
    transport = create_transport(path, prediction)
    middles = (torch.arange(64, dtype=torch.float64) + 0.5) / 64  # quantiles stand for the data without chance
    x = (MEAN + STD * torch.special.ndtri(middles)).view(16, 1, 2, 2)
    log_p, z = Sampler(transport).sample_ode_likelihood("dopri5", 3, **TIGHT)(x, gaussian(transport))
    start, stop = transport.interval(reverse=True)
    assert log_p.shape == (16,)
    exact_z = carried(transport, x, start, stop)
    torch.testing.assert_close(z, exact_z, atol=1e-6, rtol=1e-6)
    # To the last digit: the density of what is put in at the interval's one end, as it is carried to N(0, I) at the other.
    log_normal = -0.5 * (exact_z**2 + math.log(2 * math.pi))
    stretch = math.log(moments(transport, stop)[1] / moments(transport, start)[1])
    torch.testing.assert_close(log_p, (log_normal + stretch).flatten(1).sum(1), atol=1e-5, rtol=0)
    # As it is used: bits per dimension of the data, where the ends of the interval cost less than the tolerance.
    log_data = -0.5 * (((x - MEAN) / STD) ** 2 + math.log(2 * math.pi)) - math.log(STD)
    assert abs(log_p.sum() - log_data.sum()) / x.numel() / math.log(2) < 1e-3


def test_the_likelihood_does_not_care_whether_gradients_are_on() -> None:
    transport = create_transport()
    likelihood = Sampler(transport).sample_ode_likelihood("euler", 5)
    with torch.enable_grad():
        on = likelihood(points(), gaussian(transport))
    with torch.no_grad():
        off = likelihood(points(), gaussian(transport))
    assert torch.equal(on[0], off[0])
    assert torch.equal(on[1], off[1])
    assert not on[0].requires_grad
    assert not on[1].requires_grad


@pytest.mark.parametrize("method", ["euler", "heun2", "dopri5"])
def test_a_probe_is_asked_for_once_per_evaluation_in_order(method: str) -> None:
    asked, calls = [], []

    def probe(k: int, like: Tensor) -> Tensor:
        asked.append(k)
        return torch.ones_like(like)

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return gaussian(create_transport())(x, t)

    sampler().sample_ode_likelihood(method, 5, probe=probe)(points(), model)
    assert asked == list(range(len(calls)))


def test_probes_see_the_trace_and_their_mean_sees_nothing_else() -> None:
    matrix = torch.tensor([[0.2, 0.7], [-0.4, 0.5]], dtype=torch.float64)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)  # all there are, up to the sign of both
    likelihood = sampler().sample_ode_likelihood("euler", 11, probe=lambda k, like: signs)
    log_p, z = likelihood(torch.ones(2, 2, dtype=torch.float64), lambda x, t: x @ matrix.T)
    change = log_p + 0.5 * (z**2 + math.log(2 * math.pi)).sum(1)
    assert change[0] != pytest.approx(change[1].item())
    assert change.mean().item() == pytest.approx(-matrix.trace().item())  # from 1 to 0, where the density of the noise is asked


# --- stochastic differential equations ---


def distribution(transport: Transport, num_steps: int, **settings: object) -> tuple[float, float]:
    """Mean and standard deviation that the discrete SDE ends with, exactly.

    With the Gaussian model the end is affine in the start and in each step's noise, so that rows of a batch in which one of them is 1 tell the
    coefficients: no chance is involved.
    """
    mean, std = moments(transport, transport.interval(sde=True, diffusion_form=str(settings["diffusion_form"]))[0])
    x = torch.full((num_steps + 1, 1), mean, dtype=torch.float64)
    x[1] += std
    unit = torch.eye(num_steps + 1, dtype=torch.float64)
    walk = Sampler(transport).sample_sde(num_steps=num_steps, noise=lambda i, like: unit[i + 2].view(-1, 1), **settings)
    end = walk(x, gaussian(transport))[-1]
    return end[0].item(), (end[1:] - end[0]).square().sum().sqrt().item()


def expected_distribution(transport: Transport, last_step: str, size: float) -> tuple[float, float]:
    if last_step == "None":
        return moments(transport, transport.interval(sde=True)[1])
    if last_step == "Tweedie":  # the mean of x_1 given x_t, which varies less than the data
        t = torch.tensor([1 - size], dtype=torch.float64)
        return MEAN, STD**2 * transport.path.alpha(t).item() / moments(transport, 1 - size)[1]
    return MEAN, STD


SDES = list(itertools.product(DIFFUSION_FORMS, SDE_METHODS, LAST_STEPS))


@pytest.mark.parametrize(("path", "form", "method", "last_step"), [(path, *sde) for path, sde in zip(itertools.cycle(PATHS), SDES, strict=False)])
def test_every_sde_converges_to_the_mean_and_variance_of_gaussian_data(path: str, form: str, method: str, last_step: str) -> None:
    transport = create_transport(path, sample_eps=0.05)

    def errors(steps: int) -> list[float]:
        size = 0.5 / steps
        settings = {"sampling_method": method, "diffusion_form": form, "last_step": last_step, "last_step_size": size}
        found, wanted = distribution(transport, steps, **settings), expected_distribution(transport, last_step, size)
        return [a - b for a, b in zip(found, wanted, strict=True)]

    for coarse, fine in zip(errors(50), errors(100), strict=True):
        assert abs(fine) < 0.025
        assert abs(2 * fine - coarse) < 0.002  # first order in the steps, the last one too: half of them, half the error


def test_noise_that_is_not_given_is_standard_normal() -> None:
    transport, steps, n = create_transport(), 20, 20_000
    settings = {"diffusion_form": "sigma", "num_steps": steps}
    mean, std = distribution(transport, **settings)
    torch.manual_seed(0)
    end = Sampler(transport).sample_sde(**settings)(torch.randn(n, 1, dtype=torch.float64), gaussian(transport))[-1]
    # Five standard errors of the mean, std / sqrt(n), and of the standard deviation, std / sqrt(2 n).
    assert abs(end.mean().item() - mean) < 5 * std / math.sqrt(n)
    assert abs(end.std().item() - std) < 5 * std / math.sqrt(2 * n)


@pytest.mark.parametrize("last_step", ["Mean", "Euler"])
@pytest.mark.parametrize(("method", "ode_method"), [("Euler", "euler"), ("Heun", "heun2")])
def test_without_diffusion_an_sde_is_the_ode(method: str, ode_method: str, last_step: str) -> None:
    transport, steps = create_transport(), 25
    ode = Sampler(transport).sample_ode(ode_method, steps + 1)(points(), gaussian(transport))
    sde = Sampler(transport).sample_sde(method, "constant", 0.0, last_step, 1 / steps, steps)(points(), gaussian(transport))
    torch.testing.assert_close(torch.stack(sde[:-1]), ode[1:-1], atol=1e-6, rtol=1e-6)  # grids are float32
    if method == "Euler":  # the last step is one of Euler
        torch.testing.assert_close(sde[-1], ode[-1], atol=1e-6, rtol=1e-6)


def test_without_diffusion_and_last_step_euler_ends_where_the_ode_does() -> None:
    transport = create_transport()
    ode = Sampler(transport).sample_ode("euler", 25)(points(), gaussian(transport))
    sde = Sampler(transport).sample_sde("Euler", "constant", 0.0, None, num_steps=25)(points(), gaussian(transport))
    torch.testing.assert_close(torch.stack(sde), torch.cat([ode[1:], ode[-1:]]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("method", SDE_METHODS)
def test_noise_is_asked_for_once_per_step_and_decides_the_sample(method: str, last_step: str) -> None:
    transport, asked = create_transport("VP"), []

    def noise(i: int, like: Tensor) -> Tensor:
        asked.append(i)
        return torch.cos(like + i)

    walk = Sampler(transport).sample_sde(method, "linear", last_step=last_step, num_steps=7, noise=noise)
    first, second = walk(points(), gaussian(transport)), walk(points(), gaussian(transport))
    assert asked == [*range(6)] * 2
    assert len(first) == 7
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
