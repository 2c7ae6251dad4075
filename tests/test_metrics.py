"""The Frechet distance against closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import golden_files, load_case

from tstitch.metrics import FeatureStatistics, frechet_distance, inception_score, precision_recall
from tstitch.metrics.emoji import fd_emoji, gather, load_extractor, load_reference
from tstitch.presets import ROOT


def test_equal_statistics_have_distance_zero() -> None:
    root = np.random.default_rng(0).normal(size=(5, 8))  # rank 5 of 8: singular
    mu, sigma = np.arange(8.0), root.T @ root
    assert abs(frechet_distance(mu, sigma, mu, sigma)) < 1e-6


def test_commuting_covariances_have_the_closed_form() -> None:
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    a, b = rng.uniform(0.1, 4, 6), rng.uniform(0.1, 4, 6)
    shift = rng.normal(size=6)
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    measured = frechet_distance(np.zeros(6), basis @ np.diag(a) @ basis.T, shift, basis @ np.diag(b) @ basis.T)
    np.testing.assert_allclose(measured, expected, rtol=1e-10)


def test_streaming_statistics_equal_those_of_all_rows_at_once() -> None:
    rows = torch.randn(500, 7, dtype=torch.float64) * 3 + 1
    gathered = FeatureStatistics(7)
    for part in rows.split(37):
        gathered.update(part)
    np.testing.assert_allclose(gathered.mean, rows.mean(0).numpy(), rtol=1e-10)
    np.testing.assert_allclose(gathered.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-9)


def test_weights_count_rows_as_often_as_they_say() -> None:
    rows = torch.randn(20, 3, dtype=torch.float64)
    weighted, repeated = FeatureStatistics(3), FeatureStatistics(3)
    weighted.update(rows, torch.arange(1, 21).double())
    repeated.update(rows.repeat_interleave(torch.arange(1, 21), dim=0))
    np.testing.assert_allclose(weighted.mean, repeated.mean, rtol=1e-10)


def test_fd_emoji_grows_with_damage_to_the_pictures() -> None:
    folder = ROOT / "pretrained_models" / "emoji"
    network = load_extractor(folder)
    with np.load(ROOT / "assets" / "emoji" / "sample64.npz") as sample:
        images = torch.from_numpy(sample["image"]).permute(0, 3, 1, 2)
    clean = gather(network, images)
    damaged = [torch.nn.functional.avg_pool2d(images.float(), k, 1, k // 2, count_include_pad=False).to(torch.uint8) for k in (1, 3, 5, 9)]
    damaged.append(torch.randint_like(images, 256))
    distances = [fd_emoji(gather(network, x), (clean.mean, clean.covariance)) for x in damaged]
    assert abs(distances[0]) < 1e-4
    assert all(less < more for less, more in zip(distances, distances[1:], strict=False)), distances


def test_the_shipped_reference_knows_its_drawings() -> None:
    reference = load_reference(ROOT / "pretrained_models" / "emoji")
    assert 0 < frechet_distance(*reference["held_out"], *reference["train"]) < 3


@pytest.mark.parametrize("path", golden_files("adm_*.safetensors"), ids=lambda p: p.stem)
def test_frechet_distance_scores_and_manifolds_equal_those_of_adm(path: Path) -> None:
    case = load_case(path)
    t = case.tensors
    ref, samples = FeatureStatistics(t["in.acts_ref"].shape[1]), FeatureStatistics(t["in.acts_ref"].shape[1])
    ref.update(t["in.acts_ref"])
    samples.update(t["in.acts_sample"])
    fid = frechet_distance(ref.mean, ref.covariance, samples.mean, samples.covariance)
    np.testing.assert_allclose(fid, t["out.fid"].item(), rtol=1e-5)
    scores = t["out.inception_score"].flatten().tolist()
    for split_size, expected in zip(case.config["is_split_sizes"], scores, strict=True):
        np.testing.assert_allclose(inception_score(t["in.probs"].numpy(), split_size), expected, rtol=1e-4)
    precision, recall = precision_recall(t["in.acts_ref"], t["in.acts_sample"], block=300)
    assert abs(precision - t["out.precision"].item()) <= 0.01
    assert abs(recall - t["out.recall"].item()) <= 0.01
