"""Frechet distance between two sets of features, and the statistics it needs, gathered batch by batch.

Heusel et al. 2017, arXiv:1706.08500, Eq. 6: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians, means (D,), covariances (D, D), in float64.

    The trace of (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric: no complex numbers, and
    singular covariances (fewer samples than features) need no special case.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ValueError(f"statistics of {mu1.shape[0]} and {mu2.shape[0]} features cannot be compared; use the same extractor for both")
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    middle = np.linalg.eigvalsh(root @ sigma2 @ root)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(middle.clip(min=0)).sum())


class FeatureStatistics:
    """Running weighted mean and covariance of feature vectors; memory does not grow with their number.

    `totals` holds all there is (float64 arrays), so a caller can store it and go on later.
    """

    def __init__(self, dim: int) -> None:
        self.totals = {"weight": np.zeros(()), "count": np.zeros(()), "sum": np.zeros(dim), "outer": np.zeros((dim, dim))}

    def update(self, features: Tensor, weights: Tensor | None = None) -> None:
        """Add features (N, D); weights (N,), default 1 each."""
        rows = features.detach().cpu().double().numpy()
        w = np.ones(len(rows)) if weights is None else weights.double().numpy()
        self.totals["weight"] += w.sum()
        self.totals["count"] += len(rows)
        self.totals["sum"] += w @ rows
        self.totals["outer"] += (rows * w[:, None]).T @ rows

    @property
    def mean(self) -> np.ndarray:
        """(D,)."""
        return self.totals["sum"] / self.totals["weight"]

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance (D, D) for equal weights, as numpy.cov gives it."""
        mean, count = self.mean, self.totals["count"]
        return (self.totals["outer"] / self.totals["weight"] - np.outer(mean, mean)) * (count / (count - 1))
