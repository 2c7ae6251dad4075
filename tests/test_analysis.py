"""Spectra and similarity along a trajectory: the laws of the mathematics, and what the scripts write."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dit import plot_runs, similarity, visualize_sampling_freq
from dit.models import DiT
from tstitch.analysis import cosine, radial_counts, radial_power, walk_similarity, walk_spectra
from tstitch.cli import run
from tstitch.diffusion import create_diffusion
from tstitch.errors import InputError
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.noise import SampleNoise
from tstitch.sampling import Progress, sample
from tstitch.schedule import StitchSchedule
from tstitch.solvers import DDIM, DDPM

QUICK = ["--num-sampling-steps", "3", "--num-images", "2", "--device", "cpu"]


def test_white_noise_has_a_flat_spectrum_at_its_variance() -> None:
    x = 3 * SampleNoise(range(400)).latents((4, 16, 16))
    counts = radial_counts(16)
    # Each power is a mean of 1600 * count squared normals, so its standard error is at most sqrt(2 / (1600 count)).
    assert ((radial_power(x) / 9 - 1).abs() < 5 * (2 / (1600 * counts)).sqrt()).all()


@pytest.mark.parametrize(("row", "column", "radius"), [(0, 3, 3), (5, 0, 5), (3, 4, 5), (0, 8, 8), (8, 8, 11)])
def test_a_sinusoid_has_its_power_at_its_own_frequency_alone(row: int, column: int, radius: int) -> None:
    place = torch.arange(16, dtype=torch.float64) / 16
    wave = torch.cos(2 * math.pi * (row * place[:, None] + column * place))
    power = radial_power(wave.expand(1, 2, 16, 16))
    assert power.argmax() == radius
    torch.testing.assert_close(power[radius] * radial_counts(16)[radius], wave.square().sum())
    assert power.sum() - power[radius] < 1e-20


@pytest.mark.parametrize("size", [8, 9])
def test_powers_times_counts_sum_to_the_energy(size: int) -> None:
    x = SampleNoise(range(3)).latents((2, size, size))
    assert radial_counts(size).sum() == size * size
    torch.testing.assert_close((radial_power(x) * radial_counts(size)).sum(), x.double().square().sum() / 6)


def test_a_predictor_of_one_wave_shows_that_wave_at_every_step_and_leaves_it_in_the_end() -> None:
    diffusion = create_diffusion("8")
    wave = (math.sqrt(2) * torch.cos(2 * math.pi * 3 * torch.arange(16) / 16)).expand(4, 4, 16, 16)

    def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        k = int((torch.from_numpy(diffusion.timestep_map) == t[0]).nonzero())
        abar = diffusion.alphas_cumprod[k]
        return (x - abar**0.5 * wave) / (1 - abar) ** 0.5

    powers = walk_spectra(denoiser, SampleNoise(range(4)).latents((4, 16, 16)), torch.zeros(4, dtype=torch.long), solver=DDIM(diffusion))
    of_wave = radial_power(wave)
    assert of_wave.argmax() == 3
    assert powers["x_t"].shape == powers["x_0"].shape == (8, len(radial_counts(16)))
    for power in (*powers["x_0"], powers["x_t"][-1]):
        torch.testing.assert_close(power, of_wave, rtol=1e-2, atol=1e-4)
    noise_left = powers["x_t"][:, 6]  # where the wave has nothing
    assert (noise_left[1:] < noise_left[:-1]).all() and noise_left[0] > 0.5


def test_cosine_of_a_prediction_with_itself_its_negative_and_its_multiple() -> None:
    a, b = (SampleNoise(seeds).latents((4, 8, 8)) for seeds in ([0, 1], [2, 3]))
    torch.testing.assert_close(cosine(a, a), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(cosine(a, -a), -torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(cosine(a, 7 * a), torch.ones(2, dtype=torch.float64))
    assert cosine(a, b).abs().max() < 0.3


@pytest.mark.parametrize("solver", [DDIM, DDPM])
def test_similarity_is_measured_on_the_states_of_the_last_denoiser_s_walk(three_denoisers: list[DiT], solver: type) -> None:
    noise, y, solver = SampleNoise(range(3)), torch.tensor([0, 4, 9]), solver(create_diffusion("5"))
    guidance, x_T = ClassifierFreeGuidance(2.0, 10, None), noise.latents((4, 8, 8))
    cosines = walk_similarity(three_denoisers, x_T, y, solver=solver, guidance=guidance, noise=noise, max_batch=2)
    assert list(cosines) == [(0, 1), (0, 2), (1, 2)] and all(values.shape == (5, 3) for values in cosines.values())

    states = [x_T]

    def record(progress: Progress) -> None:
        states.append(progress.x)

    sample([three_denoisers[-1]], x_T, y, schedule=StitchSchedule((1.0,)), solver=solver, guidance=guidance, noise=noise, callback=record)
    with torch.no_grad():
        for i, x in enumerate(states[:-1]):
            t = torch.full((3,), solver.timesteps[i])
            small, large = (guidance(denoiser, x, t, y, 0.0)[:, :4] for denoiser in (three_denoisers[0], three_denoisers[2]))
            torch.testing.assert_close(cosines[0, 2][i], cosine(small, large), rtol=1e-4, atol=1e-4)


def test_a_denoiser_is_like_itself_at_every_step_and_opposite_to_its_negative(small_and_large: list[DiT]) -> None:
    model = small_and_large[1]
    (cosines,) = walk_similarity(
        [lambda x, t, y: -model(x, t, y), model], SampleNoise(range(2)).latents((4, 8, 8)), torch.tensor([1, 2]), solver=DDIM(create_diffusion("4"))
    ).values()
    torch.testing.assert_close(cosines, -torch.ones(4, 2, dtype=torch.float64))
    (cosines,) = walk_similarity([model, model], SampleNoise(range(2)).latents((4, 8, 8)), torch.tensor([1, 2]), solver=DDIM(create_diffusion("4"))).values()
    torch.testing.assert_close(cosines, torch.ones(4, 2, dtype=torch.float64))


@pytest.mark.parametrize("of", ["x_0", "x_t"])
def test_the_frequency_script_draws_and_writes_what_it_walked(tmp_path: Path, capsys: pytest.CaptureFixture, of: str) -> None:
    visualize_sampling_freq.main([*QUICK, "--model", "emoji-small", "--of", of, "--save_dir", str(tmp_path)])
    result = json.loads((tmp_path / "spectrum.json").read_text())
    assert result["models"] == {"S": "emoji-small"} and result["timesteps"][0] == 999 and result["seeds"] == [0, 1]
    assert np.array(result["power"][of]).shape == (3, len(result["counts"])) and np.array(result["power"]["x_0"]).min() > 0
    assert np.allclose(result["power"]["x_t"][-1], result["power"]["x_0"][-1], rtol=0.2)  # the last step leaves nearly what it predicts
    assert np.asarray(Image.open(tmp_path / "spectrum.png")).std() > 10
    assert "|    1 | 999 |" in capsys.readouterr().out and not list(tmp_path.glob(".*"))


def test_the_similarity_script_draws_writes_and_prints_every_pair(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    similarity.main([*QUICK, "--save_dir", str(tmp_path)])
    result = json.loads((tmp_path / "similarity.json").read_text())
    assert list(result["cosine"]) == ["emoji-small, emoji-base", "emoji-small, emoji-large", "emoji-base, emoji-large"]
    means = np.array([pair["mean"] for pair in result["cosine"].values()])
    assert means.shape == (3, 3) and (np.abs(means) <= 1).all() and (means[:, 0] > means[:, -1]).all()
    assert np.asarray(Image.open(tmp_path / "similarity.png")).std() > 10
    assert "emoji-base, emoji-large" in capsys.readouterr().out and not list(tmp_path.glob(".*"))


def test_one_image_has_no_spread(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(lambda: similarity.main(["--num-images", "1", "--device", "cpu", "--save_dir", str(tmp_path / "out")]))
    assert stopped.value.code == 2 and "at least 2 images" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_runs_of_equal_folder_name_are_told_apart_by_the_shortest_end_of_their_paths(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [tmp_path / name for name in ("a/dit", "b/dit", "b/sit", "b/x/y", "c/x/y")]
    for k, folder in enumerate(runs):
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("".join(json.dumps({"step": step, "loss": k + 1 / step}) + "\n" for step in (1, 2)))
    plot_runs.main([*map(str, runs), "--quantities", "loss", "--out", str(tmp_path / "runs.png")])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [[name, "2", f"{k + 0.5:.4g}"] for k, name in enumerate(("a/dit", "b/dit", "sit", "b/x/y", "c/x/y"))]
    with pytest.raises(InputError, match="the same run twice"):
        plot_runs.main([str(runs[0]), f"{runs[1]}/../../a/dit", "--quantities", "loss", "--out", str(tmp_path / "runs.png")])
