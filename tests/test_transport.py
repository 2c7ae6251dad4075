"""Laws of flows on problems whose answers are known: Gaussian data, a point mass, and linear differential equations.

For data x_1 ~ N(MEAN, STD^2), x_t ~ N(alpha MEAN, v) with v = alpha^2 STD^2 + sigma^2. All that a model can predict follows from r = (x - alpha MEAN) / v:
score -r, noise sigma r, velocity alpha' (MEAN + alpha STD^2 r) + sigma' sigma r; and the ODE keeps (x - alpha MEAN) / sqrt(v).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from conftest import redraw_weights
from torch import Tensor

from dit.models import DiT, DiT_models
from sit.models import SiT, SiT_models
from sit.transport import DIFFUSION_FORMS, LAST_STEPS, LOSS_WEIGHTS, ODE_METHODS, PATHS, PREDICTIONS, SDE_METHODS, Sampler, Transport, create_transport
from sit.transport.ode import ADAPTIVE
from tstitch.errors import InputError

MEAN, STD = 0.3, 0.5
FLOWS = list(itertools.product(PATHS, PREDICTIONS))
each_flow = pytest.mark.parametrize(("path", "prediction"), FLOWS)
TIGHT = {"atol": 1e-10, "rtol": 1e-8}


def gaussian(transport: Transport, prediction: str | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact model of the Gaussian data."""
    path, prediction = transport.path, prediction or transport.prediction

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma, d_alpha = (value(t).view(-1, *[1] * (x.dim() - 1)) for value in (path.alpha, path.sigma, path.d_alpha))
        r = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        if prediction == "score":
            return -r
        if prediction == "noise":
            return sigma * r
        slope = -sigma if transport.name == "Linear" else -alpha * d_alpha  # sigma' sigma; the others keep alpha^2 + sigma^2 = 1
        return d_alpha * (MEAN + alpha * STD**2 * r) + slope * r

    return model


def moments(transport: Transport, t: float) -> tuple[float, float]:
    """Mean and standard deviation of x_t."""
    at = torch.tensor([t], dtype=torch.float64)
    alpha, sigma = transport.path.alpha(at).item(), transport.path.sigma(at).item()
    return alpha * MEAN, math.hypot(alpha * STD, sigma)


def carried(transport: Transport, x: Tensor, start: float, stop: float) -> Tensor:
    """Where the exact ODE takes x."""
    (mean_0, std_0), (mean_1, std_1) = moments(transport, start), moments(transport, stop)
    return mean_1 + std_1 * (x - mean_0) / std_0


def points(n: int = 8) -> Tensor:
    return torch.linspace(-2, 2, n, dtype=torch.float64).view(n, 1)


def sampler(path: str = "Linear", prediction: str = "velocity", **eps: float) -> Sampler:
    return Sampler(create_transport(path, prediction, **eps))


# --- interpolants ---


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_derivatives_of_a_path_are_those_of_autograd(path: type) -> None:
    path, t = path(), torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    (d_alpha,) = torch.autograd.grad(path.alpha(t).sum(), t)
    (d_sigma,) = torch.autograd.grad(path.sigma(t).sum(), t)
    torch.testing.assert_close(path.d_alpha(t), d_alpha)
    torch.testing.assert_close(path.d_sigma(t), d_sigma)
    torch.testing.assert_close(path.rate(t), d_alpha / path.alpha(t))
    torch.testing.assert_close(path.gain(t), d_alpha / path.alpha(t) * path.sigma(t) ** 2 - path.sigma(t) * d_sigma)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_path_leads_from_noise_to_data(path: type) -> None:
    (alpha_0, alpha_1), (sigma_0, sigma_1) = path().alpha(torch.tensor([0.0, 1.0])), path().sigma(torch.tensor([0.0, 1.0]))
    assert alpha_0 < 0.01
    assert sigma_0 > 0.9999
    assert alpha_1 == 1
    assert abs(sigma_1) < 1e-7


@each_flow
def test_predictions_convert_to_the_closed_forms_and_back(path: str, prediction: str) -> None:
    transport, t = create_transport(path, prediction), torch.linspace(0.02, 0.98, 8, dtype=torch.float64)
    x = points()
    output = gaussian(transport)(x, t)
    for target in PREDICTIONS:
        torch.testing.assert_close(getattr(transport, target)(output, x, t), gaussian(transport, target)(x, t))
    torch.testing.assert_close(transport.output(transport.velocity(output, x, t), x, t), output)
    free = torch.sin(9 * x)  # the conversions hold for any output, not only for an exact one
    torch.testing.assert_close(transport.output(transport.velocity(free, x, t), x, t), free)


# --- the published intervals ---


@each_flow
def test_intervals_are_the_published_ones_where_those_are_finite(path: str, prediction: str) -> None:
    interval = create_transport(path, prediction).interval
    if path == "VP":
        # The published reverse of a noise model starts at sigma = 0.
        ode, back, sde, sde_to_end = (0, 0.999), (0.999, 0) if prediction == "noise" else (1, 0.001), (0, 0.96), (0, 0.999)
    elif prediction == "velocity":
        ode, back, sde, sde_to_end = (0, 1), (1, 0), (0, 0.96), (0, 1)
    else:
        ode, back, sde, sde_to_end = (0.001, 0.999), (0.999, 0.001), (0.001, 0.96), (0.001, 0.999)
    assert interval() == pytest.approx(ode)
    assert interval(reverse=True) == pytest.approx(back)
    assert interval(sde=True, diffusion_form="sigma", last_step_size=0.04) == pytest.approx(sde)
    assert interval(sde=True, diffusion_form="sigma") == pytest.approx(sde_to_end)


def test_train_eps_and_sample_eps_count_each_by_itself() -> None:
    for path, prediction in FLOWS:
        default = create_transport(path, prediction)
        one, other = create_transport(path, prediction, sample_eps=0.02), create_transport(path, prediction, train_eps=0.02)
        assert (one.train_eps, one.sample_eps) == (default.train_eps, 0.02)
        assert (other.train_eps, other.sample_eps) == (0.02, default.sample_eps)


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


# --- what is refused, and that nothing else is ---


def outcome(make: Callable[[], Callable], transport: Transport) -> str:
    """Either "finite" or "refused"; in float32, as samples are drawn."""
    try:
        result = make()(points().float(), gaussian(transport))
    except InputError:
        return "refused"
    assert all(torch.isfinite(state).all() for state in result)
    return "finite"


@each_flow
def test_every_sde_with_default_eps_is_finite_or_singular_by_nature(path: str, prediction: str) -> None:
    transport = create_transport(path, prediction)
    for method, form, last_step in itertools.product(SDE_METHODS, DIFFUSION_FORMS, LAST_STEPS):
        singular = path != "VP" and prediction == "velocity" and (form == "SBDM" or (method, last_step) == ("Heun", "None"))
        make = lambda: Sampler(transport).sample_sde(method, form, last_step=last_step, num_steps=6)  # noqa: E731, B023
        assert outcome(make, transport) == ("refused" if singular else "finite"), (method, form, last_step)


@each_flow
def test_every_ode_and_likelihood_with_default_eps_is_finite(path: str, prediction: str) -> None:
    transport = create_transport(path, prediction)
    for method in ODE_METHODS:
        for reverse in (False, True):
            assert outcome(lambda: Sampler(transport).sample_ode(method, 4, reverse=reverse), transport) == "finite", (method, reverse)  # noqa: B023
        assert outcome(lambda: Sampler(transport).sample_ode_likelihood(method, 4), transport) == "finite", method  # noqa: B023


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_transport("linear"), "--path-type.*Linear, GVP, VP"),
        (lambda: create_transport(prediction="x"), "--prediction.*velocity, score, noise"),
        (lambda: create_transport(loss_weight="sigma"), "--loss-weight.*None, velocity, likelihood"),
        (lambda: create_transport(train_eps=-0.1), "--train-eps"),
        (lambda: create_transport(sample_eps=0.5), "--sample-eps"),
        (lambda: create_transport(sample_eps=math.nan), "--sample-eps"),
        (lambda: create_transport("VP", train_eps=0.0).check_trainable(), "--train-eps above 0"),
        (lambda: create_transport("Linear", "noise", "velocity", train_eps=0.0).check_trainable(), "--train-eps above 0"),
        (lambda: sampler().sample_ode("heun"), "--sampling-method.*heun2"),
        (lambda: sampler().sample_ode(num_steps=1), "at least 2"),
        (lambda: sampler().sample_ode(atol=0.0), "--atol"),
        (lambda: sampler("GVP", "score", sample_eps=0.0).sample_ode(), "t = 0; pass --sample-eps above 0"),
        (lambda: sampler("VP", "noise", sample_eps=0.0).sample_ode(), "t = 1; pass --sample-eps above 0"),
        (lambda: sampler("VP", "noise", sample_eps=0.0).sample_ode_likelihood(), "t = 1; pass --sample-eps above 0"),
        (lambda: sampler().sample_sde("euler"), "--sampling-method.*Euler, Heun"),
        (lambda: sampler().sample_sde(diffusion_form="inccreasing-decreasing"), "--diffusion-form.*increasing-decreasing"),
        (lambda: sampler().sample_sde(last_step="tweedie"), "--last-step.*Tweedie"),
        (lambda: sampler().sample_sde(num_steps=1), "at least 2"),
        (lambda: sampler().sample_sde(diffusion_norm=-1.0), "--diffusion-norm"),
        (lambda: sampler().sample_sde(last_step_size=0.0), "--last-step-size.*--last-step None"),
        (lambda: sampler(prediction="noise").sample_sde(last_step_size=0.9995), "--last-step-size"),
        (lambda: sampler("Linear").sample_sde(diffusion_form="SBDM"), "SBDM.*t = 0; pass --sample-eps above 0"),
        (lambda: sampler("GVP").sample_sde(diffusion_form="SBDM"), "SBDM.*t = 0; pass --sample-eps above 0"),
        (lambda: sampler().sample_sde("Heun", "sigma", last_step=None), "score.*t = 1; pass --sample-eps above 0.*--last-step"),
    ],
)  # fmt: skip
def test_a_refusal_names_what_to_pass(call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_what_was_refused_works_with_the_eps_that_was_asked_for(path: str) -> None:
    transport = create_transport(path, sample_eps=1e-3)
    assert outcome(lambda: Sampler(transport).sample_sde("Euler", "SBDM"), transport) == "finite"
    assert outcome(lambda: Sampler(transport).sample_sde("Heun", "sigma", last_step=None), transport) == "finite"


# --- training ---

U = torch.linspace(0.02, 0.98, 8, dtype=torch.float64)
each_weight = pytest.mark.parametrize("weight", LOSS_WEIGHTS)


def time_of(transport: Transport) -> Tensor:
    first, last = transport.interval(transport.train_eps)
    return first + U * (last - first)


@each_flow
@each_weight
def test_losses_weigh_errors_as_they_are_said_to(path: str, prediction: str, weight: str) -> None:
    transport = create_transport(path, prediction, weight)
    x_0, x_1 = torch.sin(torch.arange(48, dtype=torch.float64)).view(8, 3, 2), torch.full((8, 3, 2), MEAN, dtype=torch.float64)
    t = time_of(transport)
    x_t, velocity = transport.path.interpolate(t, x_0, x_1)
    right = {"velocity": velocity, "noise": x_0, "score": -x_0 / transport.path.sigma(t).view(-1, 1, 1)}[prediction]
    wrong = 0.1 * torch.cos(3 * x_0)  # the error of the model below
    seen = []

    def model(x: Tensor, t: Tensor, y: str) -> Tensor:
        seen.append((x, t, y))
        return right + wrong

    terms = transport.training_losses(model, x_1, {"y": "label"}, x_0=x_0, u=U)
    (x, time, label) = seen[0]
    torch.testing.assert_close(x, x_t)
    torch.testing.assert_close(time, t)
    assert label == "label"
    assert torch.equal(terms["pred"], right + wrong)
    # The error as one of velocity, of score and of noise: conversions are affine, so their slope is their difference.
    as_velocity, as_score, as_noise = (getattr(transport, kind)(right + wrong, x_t, t) - getattr(transport, kind)(right, x_t, t) for kind in PREDICTIONS)
    if prediction == "velocity" or weight == "velocity":
        squared = as_velocity**2
    elif weight == "likelihood":  # half of this times dt bounds the likelihood, with the diffusion whose SDE is that of training
        squared = transport.path.diffusion(t, "SBDM").view(-1, 1, 1) * as_score**2
    else:
        squared = as_noise**2
    assert terms["loss"].shape == (8,)
    torch.testing.assert_close(terms["loss"], squared.mean(dim=(1, 2)))


@each_flow
def test_the_exact_model_has_the_lowest_loss(path: str, prediction: str) -> None:
    transport, n = create_transport(path, prediction), 20_000
    generator = torch.Generator().manual_seed(0)
    x_1 = MEAN + STD * torch.randn(n, 1, dtype=torch.float64, generator=generator)
    x_0, u = torch.randn(n, 1, dtype=torch.float64, generator=generator), torch.rand(n, dtype=torch.float64, generator=generator)
    exact = gaussian(transport)

    def loss(model: Callable) -> float:
        return transport.training_losses(model, x_1, x_0=x_0, u=u)["loss"].mean().item()

    # A change of 10 % of the output costs far more than chance gives back, which is its size times a standard error.
    for change in (0.1, -0.1):
        assert loss(exact) < loss(lambda x, t: exact(x, t) * (1 + change))  # noqa: B023
        assert loss(exact) < loss(lambda x, t: exact(x, t) + change * x)  # noqa: B023


@each_flow
@each_weight
def test_losses_are_finite_at_both_ends_of_training(path: str, prediction: str, weight: str) -> None:
    transport = create_transport(path, prediction, weight)
    u = torch.tensor([0.0, 1 - 2**-24])  # all that torch.rand can give
    terms = transport.training_losses(lambda x, t: torch.ones_like(x), torch.ones(2, 1), x_0=torch.ones(2, 1), u=u)
    assert torch.isfinite(terms["loss"]).all()


def test_noise_and_time_of_training_are_drawn_afresh() -> None:
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return x

    x_1 = torch.zeros(4000, 1)
    torch.manual_seed(0)
    for _ in range(2):
        create_transport().training_losses(model, x_1)
    (x, t), (other_x, other_t) = seen
    assert not torch.equal(x, other_x)
    assert not torch.equal(t, other_t)
    x_0 = x[:, 0] / (1 - t)
    # Five standard errors of 4000 values.
    assert abs(x_0.std().item() - 1) < 5 / math.sqrt(8000)
    assert abs(t.mean().item() - 0.5) < 5 / math.sqrt(12 * 4000)


# --- the network ---


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_sit_is_a_dit_whose_second_half_of_channels_is_left_out(learn_sigma: bool) -> None:
    arguments = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 10, "learn_sigma": learn_sigma}
    sit, dit = redraw_weights(SiT(**arguments), seed=1), DiT(**arguments).eval()
    dit.load_state_dict(sit.state_dict(), strict=True)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.37, 1.0]), torch.tensor([1, 9, 10])
    with torch.no_grad():
        assert sit(x, t, y).shape == x.shape
        assert torch.equal(sit(x, t, y), dit(x, t, y)[:, :4])
        assert not torch.equal(sit(x, t, y)[1], sit(x, t.round(), y)[1])  # time is continuous


def test_every_size_of_dit_is_one_of_sit() -> None:
    assert list(SiT_models) == [f"SiT-{size}/{patch}" for size in ("XL", "L", "B", "S") for patch in (2, 4, 8)]
    for name, build in SiT_models.items():
        assert build.func is SiT
        assert build.keywords == DiT_models[name.replace("SiT", "DiT")].keywords
