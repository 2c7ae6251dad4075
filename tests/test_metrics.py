"""Metrics against closed forms, definitions and ADM's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import golden_files, load_case
from safetensors import safe_open

from tstitch.metrics import FeatureStatistics, InceptionScore, frechet_distance, inception_score, precision_recall
from tstitch.metrics.extractors import create_extractor, gather, load_reference_statistics
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
    extractor = create_extractor("emoji")
    with np.load(ROOT / "assets" / "emoji" / "sample64.npz") as sample:
        images = torch.from_numpy(sample["image"]).permute(0, 3, 1, 2)
    clean = gather(extractor, images)
    damaged = [torch.nn.functional.avg_pool2d(images.float(), k, 1, k // 2, count_include_pad=False).to(torch.uint8) for k in (1, 3, 5, 9)]
    damaged.append(torch.randint_like(images, 256))
    gathered = [gather(extractor, x) for x in damaged]
    distances = [frechet_distance(g.mean, g.covariance, clean.mean, clean.covariance) for g in gathered]
    assert abs(distances[0]) < 1e-4
    assert all(less < more for less, more in zip(distances, distances[1:], strict=False)), distances


def test_the_shipped_reference_knows_its_drawings() -> None:
    extractor = create_extractor("emoji")
    held_out, train = load_reference_statistics(extractor, "held_out"), load_reference_statistics(extractor)
    assert 0 < frechet_distance(*held_out, *train) < 3


def test_the_inception_score_of_batches_is_that_of_all_rows_and_of_its_formula() -> None:
    probs = torch.rand(230, 12).pow(6).softmax(dim=1).numpy()
    probs[3] = np.eye(12)[5]  # certain: 0 log 0 counts as 0
    for split_size in (50, 100, 1000):
        streamed = InceptionScore(split_size)
        for part in np.array_split(probs, 7):
            streamed.update(part)
        parts = [probs[start : start + split_size].astype(np.float64) for start in range(0, 230, split_size)]
        with np.errstate(divide="ignore", invalid="ignore"):
            divergences = [np.nan_to_num(p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean() for p in parts]
        np.testing.assert_allclose(streamed.value, np.exp(divergences).mean(), rtol=1e-10)
        np.testing.assert_allclose(inception_score(probs, split_size), streamed.value, rtol=1e-10)
        assert len(streamed) == 230


def test_precision_and_recall_tell_a_narrow_from_a_wide_set() -> None:
    generator = torch.Generator().manual_seed(0)
    wide, narrow = torch.randn(400, 4, generator=generator), 0.3 * torch.randn(400, 4, generator=generator)
    precision, recall = precision_recall(wide, narrow)
    assert precision > 0.95 and recall < 0.3
    assert precision_recall(narrow, wide) == (recall, precision)  # by definition
    assert precision_recall(wide, wide) == (1, 1)


@pytest.mark.parametrize("path", golden_files("adm_*.safetensors"), ids=lambda p: p.stem)
def test_frechet_distance_scores_and_manifolds_equal_those_of_adm(path: Path) -> None:
    case = load_case(path)
    with safe_open(path, "pt") as file:
        expected = json.loads(file.metadata()["results"])
    t = case.tensors
    ref, samples = FeatureStatistics(t["in.acts_ref"].shape[1]), FeatureStatistics(t["in.acts_ref"].shape[1])
    ref.update(t["in.acts_ref"])
    samples.update(t["in.acts_sample"])
    # ADM's means and scores are float32; 1e-6 is what that leaves.
    np.testing.assert_allclose(frechet_distance(ref.mean, ref.covariance, samples.mean, samples.covariance), expected["fid"], rtol=1e-6)
    for split_size in case.config["is_split_sizes"]:
        np.testing.assert_allclose(inception_score(t["in.probs"].numpy(), split_size), expected["inception_score"][str(split_size)], rtol=1e-6)
    precision, recall = precision_recall(t["in.acts_ref"], t["in.acts_sample"], block=300)
    # ADM compares float16 distances where these are finite: a point at the edge of a ball may fall otherwise.
    assert abs(precision - expected["precision"]) <= 0.01
    assert abs(recall - expected["recall"]) <= 0.01
