"""Likelihood of data: exact where a model's density is known, a bound where pictures have levels, the same bytes from any ranks and after any kill."""

from __future__ import annotations

import argparse
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sit import likelihood
from sit.likelihood import add_likelihood_args, dequantize, draw_data, measure_likelihood, open_likelihood_data, sign_probe, wants_likelihood
from sit.transport import create_transport
from tstitch.autoencoder import PIXELS, Autoencoder
from tstitch.cli import new_parser
from tstitch.data import open_features, write_features
from tstitch.errors import InputError
from tstitch.generate import Ranks
from tstitch.noise import SampleNoise
from tstitch.pictures import ImageFolder

CPU = torch.device("cpu")


class GaussianFlow(nn.Module):
    """The exact velocity of Linear towards N(mean, covariance): mean a number or like x, covariance of the flattened x by eigenvectors and eigenvalues."""

    def __init__(self, shape: tuple[int, ...], mean: float | Tensor, deviations: Tensor, basis: Tensor | None = None) -> None:
        super().__init__()
        size = math.prod(shape)
        self.latent_shape = shape
        self.mean = torch.as_tensor(mean).expand(shape).reshape(size)
        self.deviations, self.basis = deviations.expand(size), torch.eye(size) if basis is None else basis
        self.labels: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.labels.append(y)
        t, variance = t[:, None], self.deviations**2
        slope = (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2)
        return (self.mean + ((x.flatten(1) - t * self.mean) @ self.basis * slope) @ self.basis.T).view_as(x)

    def log_prob(self, x: Tensor) -> Tensor:
        z = ((x.flatten(1) - self.mean) @ self.basis / self.deviations).double()
        return (-0.5 * z**2 - self.deviations.double().log() - 0.5 * math.log(2 * math.pi)).sum(dim=1)


class Data:
    """Latents kept in memory; pixels where they say so."""

    def __init__(self, latents: Tensor, vae: str = "some") -> None:
        self.rows, self.labels = latents, torch.arange(len(latents)) % 10
        self.num_classes, self.latent_shape = 10, tuple(latents.shape[1:])
        self.index = {"vae": vae, "count": len(latents)}

    def __len__(self) -> int:
        return len(self.rows)

    def latents(self, index: Tensor) -> Tensor:
        return self.rows[index]


def words(*argv: str) -> argparse.Namespace:
    parser = new_parser(None)
    add_likelihood_args(parser)
    args = parser.parse_args(argv)
    args.tf32 = False
    return args


def measure(folder: Path, model: nn.Module, data: object, *argv: str, ranks: Ranks = Ranks(0, 1), **more: object) -> dict:  # noqa: B008
    arguments = {"method": "dopri5", "num_steps": 2, "atol": 1e-6, "rtol": 1e-6, "seed": 3, "batch": 8, "settings": {"weights": "w"}, "device": CPU, **more}
    measure_likelihood(ranks, words(*argv), model, create_transport(), data, folder=folder, **arguments)
    return json.loads((folder / "likelihood.json").read_text()) if ranks.rank == 0 else {}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels_of(levels: Tensor) -> Data:
    return Data((levels + 0.5) / 128 - 1, PIXELS)


@pytest.fixture(autouse=True)
def torch_as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def correlated(spread: float = 1.0) -> GaussianFlow:
    """Twelve dimensions whose Jacobian is not diagonal, so that probes have something to estimate."""
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0]
    return GaussianFlow((3, 2, 2), 0.3, torch.linspace(1 - 0.5 * spread, 1 + spread, 12), basis)


def draws(model: GaussianFlow, count: int) -> Tensor:
    normal = torch.randn(count, len(model.mean), generator=torch.Generator().manual_seed(1))
    return (model.mean + normal * model.deviations @ model.basis.T).view(count, *model.latent_shape)


def test_bits_per_dimension_of_a_gaussian_are_the_closed_form_with_its_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = GaussianFlow((4, 2, 2), 0.5, torch.tensor(0.2))
    data = Data(draws(model, 20))
    result = measure(tmp_path, model, data)
    exact = -model.log_prob(data.rows) / (16 * math.log(2))
    assert abs(result["bits_per_dim"] - float(exact.mean())) < 1e-3
    assert abs(result["standard_error"] - float(exact.std() / math.sqrt(20))) < 1e-3
    assert (result["num_images"], result["unit"], result["dimensions"]) == (20, "bits per latent dimension", 16)
    with np.load(tmp_path / "likelihood.npz") as archive:
        assert archive["index"].tolist() == list(range(20))
        np.testing.assert_allclose(archive["bits_per_dim"], exact.numpy(), atol=1e-3)
        np.testing.assert_allclose(archive["logp"], -exact.numpy() * 16 * math.log(2), atol=1e-2)
    printed = f"{result['bits_per_dim']:.3f} +- {result['standard_error']:.3f} bits per latent dimension over 20 images (a density, without dequantization)"
    assert capsys.readouterr().out == printed + "\n"


def test_every_item_is_given_its_own_label(tmp_path: Path) -> None:
    model = GaussianFlow((3, 2, 2), 0.0, torch.tensor(1.0))
    measure(tmp_path, model, Data(draws(model, 20)), batch=7)
    assert {tuple(y.tolist()) for y in model.labels} == {tuple(k % 10 for k in range(start, min(start + 7, 20))) for start in (0, 7, 14)}


def test_probes_are_unbiased_and_spread_less_the_more_there_are_and_the_more_often_they_are_drawn(tmp_path: Path) -> None:
    model = correlated()
    data = Data(draws(model, 150))
    exact, spread = model.log_prob(data.rows).numpy(), {}
    for method, probes in (("dopri5", 1), ("dopri5", 4), ("heun2", 1)):
        folder = tmp_path / f"{method}{probes}"
        measure(folder, model, data, "--probes", str(probes), method=method, num_steps=31, batch=150, rtol=1e-4)
        with np.load(folder / "likelihood.npz") as archive:
            error = archive["logp"] - exact
        spread[method, probes] = error.std()
        assert abs(error.mean()) < 4 * error.std() / math.sqrt(150) + 2e-3
    assert 1.6 < spread["dopri5", 1] / spread["dopri5", 4] < 2.5  # the square root of 4
    assert spread["heun2", 1] < 0.7 * spread["dopri5", 1]  # its errors average out along the trajectory


def test_an_adaptive_method_keeps_the_probe_that_a_fixed_step_method_draws_anew() -> None:
    noise, like = SampleNoise([5, 6]), torch.zeros(2, 3, 4, 4)
    anew, once = (sign_probe(noise, 7, once) for once in (False, True))
    assert torch.equal(once(0, like), once(9, like)) and torch.equal(once(0, like), anew(0, like))
    assert not torch.equal(anew(1, like), anew(0, like)) and anew(2, like).unique().tolist() == [-1, 1]
    assert torch.equal(sign_probe(SampleNoise([6]), 7, False)(4, like[:1]), anew(4, like)[1:])


@pytest.mark.parametrize("how", ["uniform", "gaussian"])
def test_dequantized_pixels_lie_in_the_cell_of_their_level_and_decode_to_it(how: str) -> None:
    levels = torch.arange(256, dtype=torch.uint8).repeat(12).view(4, 3, 16, 16)
    noise = SampleNoise(range(4))
    x, correction = dequantize(levels, how, noise)
    u = (x.double() + 1) * 128 - levels
    assert u.min() > -1e-5 and u.max() < 1 + 1e-5 and abs(u.mean() - 0.5) < 0.02
    assert abs(u.std() - (1 / math.sqrt(12) if how == "uniform" else likelihood.GAUSSIAN_WIDTH * 0.9866)) < 0.01
    inside = (u > 1e-4) & (u < 1 - 1e-4)
    assert torch.equal(Autoencoder(PIXELS).decode(x)[inside], levels[inside])
    assert correction.shape == (4,)


@pytest.mark.parametrize("how", ["uniform", "gaussian"])
def test_noise_densities_integrate_to_one(how: str) -> None:
    """The mean of 1 / q over draws of q is the length of the cell, which says that q is normalised and is the density of what is drawn."""
    x, correction = dequantize(torch.full((4000, 1, 1, 1), 7, dtype=torch.uint8), how, SampleNoise(range(4000)))
    u, log_q = (x.flatten().double() + 1) * 128 - 7, math.log(2 / 256) - correction
    middle = (u - 0.5).abs() < 0.25  # 1 / q is wild in the tails
    assert abs(float((-log_q).exp()[middle].sum() / 4000) - 0.5) < 0.02


def discrete_bits(model: GaussianFlow, levels: Tensor) -> float:
    """Exact bits per dimension of levels under a Gaussian of independent pixels."""
    edges = [torch.special.ndtr(((levels.flatten(1).double() + k) / 128 - 1 - model.mean) / model.deviations) for k in (0, 1)]
    return float(-(edges[1] - edges[0]).log2().mean())


@pytest.mark.parametrize("width", [1.2, 5.0])
def test_the_uniform_bound_lies_above_the_exact_bits_of_levels_and_close(tmp_path: Path, width: float, capsys: pytest.CaptureFixture) -> None:
    model = GaussianFlow((3, 4, 4), 0.2, torch.tensor(width / 128))
    levels = ((draws(model, 100) + 1) * 128).floor()
    result = measure(tmp_path, model, pixels_of(levels), batch=50, rtol=1e-5)
    # For a smooth density of this width in levels the gap is 1 / (24 width^2) nats; a draw of u moves log p by about (u - 1/2) / width.
    gap, spread = 1 / (24 * width**2 * math.log(2)), 1 / (math.sqrt(12) * width * math.log(2))
    assert result["bits_per_dim"] == pytest.approx(discrete_bits(model, levels) + gap, abs=4 * spread / math.sqrt(4800))
    assert width > 2 or gap > 2 * 4 * spread / math.sqrt(4800)  # the narrow model's figure is above the exact one, not about it
    assert result["unit"] == "bits per pixel channel" and result["settings"]["dequantization"] == "uniform"
    assert "bits per dimension over 100 images (uniform dequantization)" in capsys.readouterr().out


def test_the_gaussian_bound_is_exact_for_a_model_that_is_as_narrow_around_its_level(tmp_path: Path) -> None:
    """There, u given k has the very density that dequantization draws from; the uniform bound is far off."""
    model = GaussianFlow((3, 4, 4), (100 + 0.5) / 128 - 1, torch.tensor(likelihood.GAUSSIAN_WIDTH / 128))
    levels = torch.full((6, 3, 4, 4), 100.0)
    found = {how: measure(tmp_path / how, model, pixels_of(levels), "--dequantization", how) for how in ("gaussian", "uniform")}
    exact = discrete_bits(model, levels)
    assert exact < 0.01
    assert abs(found["gaussian"]["bits_per_dim"] - exact) < 1e-3 and found["gaussian"]["standard_error"] < 1e-3
    assert found["uniform"]["bits_per_dim"] > exact + 0.5


def test_the_gaussian_bound_lies_above_the_exact_bits_of_a_wide_model(tmp_path: Path) -> None:
    model = GaussianFlow((3, 4, 4), 0.2, torch.tensor(5 / 128))
    levels = ((draws(model, 50) + 1) * 128).floor()
    result = measure(tmp_path, model, pixels_of(levels), "--dequantization", "gaussian", batch=50, rtol=1e-5)
    entropy_lost = -(0.5 * math.log2(2 * math.pi * math.e) + math.log2(likelihood.GAUSSIAN_WIDTH))  # of q against the even density of a cell
    assert result["bits_per_dim"] == pytest.approx(discrete_bits(model, levels) + entropy_lost, abs=0.03)


def test_without_dequantization_pixels_give_a_density(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = GaussianFlow((3, 2, 2), 0.0, torch.tensor(0.5))
    data = pixels_of(torch.arange(48.0).view(4, 3, 2, 2) + 100)
    result = measure(tmp_path, model, data, "--dequantization", "none")
    assert result["bits_per_dim"] == pytest.approx(float(-model.log_prob(data.rows).mean() / (12 * math.log(2))), abs=1e-3)
    assert "bits per pixel channel over 4 images (a density, without dequantization)" in capsys.readouterr().out


class ThreadRank(Ranks):
    """A rank among threads."""

    board: dict[int, object] = {}
    barrier = threading.Barrier(3, timeout=600)

    def gather(self, value: object) -> list[object]:
        self.board[self.rank] = value
        self.barrier.wait()
        values = [self.board[rank] for rank in range(self.size)]
        self.barrier.wait()
        return values


def test_three_ranks_write_the_bytes_of_one(tmp_path: Path) -> None:
    model = correlated()
    data = pixels_of((draws(model, 16) * 20 + 100).round())
    measure(tmp_path / "one", model, data, "--probes", "2", batch=3, rtol=1e-3)
    refusals: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            measure(tmp_path / "three", model, data, "--probes", "2", batch=3, rtol=1e-3, ranks=ThreadRank(rank, 3))
        except BaseException as error:
            refusals.append(error)
            ThreadRank.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not refusals
    assert contents(tmp_path / "three") == contents(tmp_path / "one") and contents(tmp_path / "one").keys() == {"likelihood.json", "likelihood.npz"}


def test_a_measurement_that_was_cut_off_ends_as_if_nothing_had_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = correlated()
    data = Data(draws(model, 20))
    measure(tmp_path / "whole", model, data, batch=3, rtol=1e-3)
    draw, drawn = likelihood.draw_data, []

    def cut_off(*arguments):
        drawn.append(arguments[1].tolist())
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(likelihood, "draw_data", cut_off)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "cut", model, data, batch=3, rtol=1e-3)
    assert not (tmp_path / "cut" / "likelihood.json").exists() and len(list((tmp_path / "cut" / "likelihood_work").glob("0*.npy"))) == 3
    measure(tmp_path / "cut", model, data, batch=3, rtol=1e-3)
    assert drawn[3:] == [drawn[3], *([9 + 3 * k + j for j in range(3) if 9 + 3 * k + j < 20] for k in range(4))]  # what was done is not done again
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    measure(tmp_path / "cut", model, data, batch=3, rtol=1e-3)
    assert len(drawn) == 8 and contents(tmp_path / "cut") == contents(tmp_path / "whole")


def store(folder: Path, count: int = 9) -> Path:
    """Features of 4x2x2 latents, with mirror images and a posterior that is wide, and the same for all."""
    moments = np.zeros((count, 2, 8, 2, 2))
    write_features(folder, moments, np.arange(count) % 3, num_classes=3, vae="some", scaling_factor=0.5)
    return folder


def test_an_item_is_drawn_from_its_own_seed_and_leaves_the_global_stream_alone(tmp_path: Path) -> None:
    data = open_features(store(tmp_path))
    torch.manual_seed(0)
    together = draw_data(data, torch.tensor([2, 7, 4]), seed=5)
    after = torch.rand(1)
    assert not torch.equal(together[0], together[1]) and 0.4 < together.std() < 0.6
    assert torch.equal(together[1:2], draw_data(data, torch.tensor([7]), seed=5))
    assert not torch.equal(together, draw_data(data, torch.tensor([2, 7, 4]), seed=6))
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_a_smaller_number_of_samples_is_a_draw_from_all_classes(tmp_path: Path) -> None:
    model = GaussianFlow((3, 2, 2), 0.0, torch.tensor(1.0))
    data = Data(draws(model, 300))
    result = measure(tmp_path, model, data, "--num-likelihood-samples", "30", batch=30)
    with np.load(tmp_path / "likelihood.npz") as archive:
        index = archive["index"]
    assert result["num_images"] == 30 == len(set(index.tolist())) and index.min() < 60 and index.max() >= 240


@pytest.mark.parametrize(("change", "says"), [({"seed": 4}, "seed"), ({"settings": {"weights": "v"}}, "weights"), ({"rtol": 1e-2}, "rtol")])
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_measurement_is_refused_and_left_alone(
    tmp_path: Path, change: dict, says: str, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GaussianFlow((3, 2, 2), 0.0, torch.tensor(1.0))
    data = Data(draws(model, 4))
    if finished:
        measure(tmp_path, model, data)
    else:
        with monkeypatch.context() as patched, pytest.raises(TypeError):
            patched.setattr(likelihood, "draw_data", None)
            measure(tmp_path, model, data)
    before = contents(tmp_path)
    assert before
    with pytest.raises(InputError, match=rf"another measurement \(other {says}\)"):
        measure(tmp_path, model, data, **change)
    assert contents(tmp_path) == before


def test_what_cannot_be_measured_is_refused_before_any_file_is_written(tmp_path: Path) -> None:
    model = GaussianFlow((3, 2, 2), 0.0, torch.tensor(1.0))
    data = Data(draws(model, 4))
    for more, data_, says, options in (
        (["--dequantization", "uniform"], data, "latents have no levels", {}),
        (["--dequantization", "gaussian"], data, "latents have no levels", {}),
        (["--num-likelihood-samples", "1"], data, "2 or more", {}),
        (["--num-likelihood-samples", "5"], data, "5 of 4 items", {}),
        ([], Data(torch.zeros(4, 4, 2, 2)), r"shape \(4, 2, 2\), the model of \(3, 2, 2\)", {}),
        ([], data, "'heun'", {"method": "heun"}),
    ):
        with pytest.raises(InputError, match=says):
            measure(tmp_path / "out", model, data_, *more, **options)
    assert not (tmp_path / "out").exists()


def test_a_likelihood_that_is_not_finite_is_refused_by_the_item(tmp_path: Path) -> None:
    model = GaussianFlow((3, 2, 2), 0.0, torch.tensor(1.0))
    rows = draws(model, 4)
    rows[2, 0, 0, 0] = math.inf
    with pytest.raises(InputError, match=r"items \[2\] is not finite"):
        measure(tmp_path, model, Data(rows), method="euler", num_steps=3)


def test_words_that_contradict_one_another_are_refused(tmp_path: Path) -> None:
    some = ["--features-path", str(tmp_path)]
    for argv, options, says in (
        (["--likelihood"], {}, "either --features-path or --data-path"),
        (["--likelihood", *some, "--data-path", "x"], {}, "either --features-path or --data-path"),
        (["--likelihood", *some], {"cfg_scale": 4.0}, "pass --cfg-scale 1, not 4"),
        (["--likelihood", *some], {"equation": "SDE"}, "pass ODE"),
        ([*some, "--probes", "2"], {}, "--features-path, --probes belong to --likelihood"),
    ):
        with pytest.raises(InputError, match=says):
            wants_likelihood(words(*argv), **{"equation": "ODE", "cfg_scale": 1.0, **options})
    assert wants_likelihood(words("--likelihood", *some), equation="ODE", cfg_scale=1.0)
    assert not wants_likelihood(words(), equation="SDE", cfg_scale=4.0)


def test_latents_of_another_autoencoder_are_refused(tmp_path: Path) -> None:
    write_features(tmp_path / "f", np.zeros((2, 1, 6, 4, 4)), np.zeros(2), num_classes=1, vae="my/vae", scaling_factor=1.0, vae_hash="0123")
    args = words("--likelihood", "--features-path", str(tmp_path / "f"))
    with pytest.raises(InputError, match="made by my/vae, not by none"):
        open_likelihood_data(args, image_size=4, num_classes=1, vae=PIXELS, device=CPU)


def test_labels_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    args = words("--likelihood", "--features-path", str(store(tmp_path)))
    assert len(open_likelihood_data(args, image_size=4, num_classes=3, vae="ema", device=CPU)) == 9
    with pytest.raises(InputError, match="have 3 classes, the model 2"):
        open_likelihood_data(args, image_size=4, num_classes=2, vae="ema", device=CPU)


def test_pictures_in_a_folder_are_measured_by_their_levels(tmp_path: Path) -> None:
    model = GaussianFlow((3, 8, 8), 0.2, torch.tensor(0.6))
    levels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8))
    for k, picture in enumerate(levels):
        path = tmp_path / "pictures" / "ab"[k // 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    argv = ["--likelihood", "--data-path", str(tmp_path / "pictures")]
    data = open_likelihood_data(words(*argv), image_size=8, num_classes=2, vae=PIXELS, device=CPU)
    assert torch.equal(Autoencoder(PIXELS).decode(draw_data(data, torch.arange(4), 0)), levels)
    result = measure(tmp_path / "out", model, data, *argv)
    assert result["bits_per_dim"] == pytest.approx(discrete_bits(model, levels), abs=2e-3)
    assert result["settings"]["data"]["pictures_hash"] == ImageFolder(tmp_path / "pictures", 8).hash
