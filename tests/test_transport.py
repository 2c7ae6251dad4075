"""Laws of paths, predictions and training losses on Gaussian data; what is refused, and that nothing else is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from conftest import redraw_weights
from gaussian_flow import FLOWS, MEAN, STD, each_flow, gaussian, points, sampler
from torch import Tensor

from dit.models import DiT, DiT_models
from sit.models import SiT, SiT_models
from sit.transport import DIFFUSION_FORMS, LAST_STEPS, LOSS_WEIGHTS, ODE_METHODS, PATHS, PREDICTIONS, SDE_METHODS, Sampler, Transport, create_transport
from tstitch.errors import InputError

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
