"""Inception score, precision and recall, with the definitions of ADM's evaluation suite (guided-diffusion, evaluations/)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tstitch.errors import InputError


class InceptionScore:
    """exp(E KL(p(y|x) || p(y))), Salimans et al. 2016, arXiv:1606.03498, averaged over splits; memory does not grow with the number of rows.

    Args:
        split_size: rows of a split, taken in order; a last, shorter one counts as much as the others, as in ADM.
    """

    def __init__(self, split_size: int = 5000) -> None:
        self.split_size = split_size
        self._done: list[float] = []
        self._open: np.ndarray | None = None  # sums of the split being filled

    def update(self, probs: np.ndarray | Tensor) -> None:
        """Add class probabilities (N, K), rows sum to 1."""
        rest = np.asarray(torch.as_tensor(probs).cpu(), dtype=np.float64)
        while len(rest):
            room = self.split_size - (int(self._open[0]) if self._open is not None else 0)
            part, rest = rest[:room], rest[room:]
            sums = probability_sums(part)
            self._open = sums if self._open is None else self._open + sums
            if self._open[0] == self.split_size:
                self._done.append(score_of_sums(self._open))
                self._open = None

    def __len__(self) -> int:
        """Number of rows so far."""
        return len(self._done) * self.split_size + (int(self._open[0]) if self._open is not None else 0)

    @property
    def value(self) -> float:
        """Mean over the splits."""
        return float(np.mean(self._done if self._open is None else [*self._done, score_of_sums(self._open)]))


def probability_sums(probs: np.ndarray | Tensor) -> np.ndarray:
    """What the score of class probabilities (N, K) needs of them, float64 (K + 2,): N, the sum of p log p, and the sum of p for each class."""
    p = np.asarray(torch.as_tensor(probs).cpu(), dtype=np.float64)
    # 0 log 0 is 0: float32 probabilities may underflow.
    return np.concatenate([[len(p), (p * np.log(np.where(p > 0, p, 1))).sum()], p.sum(axis=0)])


def score_of_sums(sums: np.ndarray) -> float:
    """Inception score from `probability_sums`: the mean of KL(p_i || mean p) is mean(sum p_i log p_i) - sum(mean p log mean p)."""
    mean = sums[2:] / sums[0]
    return float(np.exp(sums[1] / sums[0] - (mean * np.log(np.where(mean > 0, mean, 1))).sum()))


def inception_score(probs: np.ndarray | Tensor, split_size: int = 5000) -> float:
    """`InceptionScore` of class probabilities (N, K) that are all at hand."""
    score = InceptionScore(split_size)
    score.update(probs)
    return score.value


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared Euclidean distances (len(rows), len(columns)), float64."""
    rows, columns = rows.double(), columns.double()
    return (rows.square().sum(1)[:, None] - 2 * rows @ columns.T + columns.square().sum(1)[None]).clamp(min=0)


def manifold_radii(features: Tensor, k: int = 3, block: int = 2000) -> Tensor:
    """Squared distance of each feature vector (N, D) to its k-th nearest neighbour, itself not counted; (N,), float64."""
    # The smallest distance is that to itself, so the k-th neighbour is the (k + 1)-th smallest.
    return torch.cat([_squared_distances(part, features).kthvalue(k + 1, dim=1).values for part in _blocks(features, block, "neighbours")])


def _blocks(features: Tensor, block: int, what: str) -> Iterable[Tensor]:
    parts = features.split(block)
    return tqdm(parts, desc=what, unit="block", leave=False, disable=len(parts) < 5)


def precision_recall(ref: Tensor | np.ndarray, samples: Tensor | np.ndarray, k: int = 3, block: int = 2000) -> tuple[float, float]:
    """Improved precision and recall, Kynkaanniemi et al. 2019, arXiv:1904.06991.

    ADM computes distances in float16 where they are finite; here they are float64, so a few points of a thousand may fall otherwise.

    Args:
        ref: features of the reference (N, D).
        samples: features of the samples (M, D).
        k: neighbour whose distance is the radius of a ball.
        block: rows compared at a time; memory is block * (N + M) numbers.

    Returns:
        precision, the share of samples inside any ball around a reference, and recall, the share of references inside any ball around a sample.
    """
    ref, samples = torch.as_tensor(ref), torch.as_tensor(samples)
    if min(len(ref), len(samples)) <= k:
        raise InputError(f"precision and recall with k={k} need more than {k} vectors, got {len(ref)} and {len(samples)}")
    radii_ref, radii_samples = manifold_radii(ref, k, block), manifold_radii(samples, k, block)
    inside_ref = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    inside_samples: list[Tensor] = []
    for part in _blocks(ref, block, "precision and recall"):
        start = sum(len(x) for x in inside_samples)
        distances = _squared_distances(part, samples)
        inside_ref |= (distances <= radii_ref[start : start + len(part), None]).any(dim=0)
        inside_samples.append((distances <= radii_samples[None]).any(dim=1))
    return inside_ref.float().mean().item(), torch.cat(inside_samples).float().mean().item()
