"""Inception score, precision and recall, with the definitions of ADM's evaluation suite (guided-diffusion, evaluations/)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tstitch.errors import InputError


def inception_score(probs: np.ndarray, split_size: int = 5000) -> float:
    """exp(E KL(p(y|x) || p(y))), Salimans et al. 2016, arXiv:1606.03498, averaged over splits.

    Args:
        probs: class probabilities (N, K), rows sum to 1.
        split_size: rows of a split, taken in order; a last, shorter one counts as much as the others, as in ADM.
    """
    scores = []
    for start in range(0, len(probs), split_size):
        part = np.asarray(probs[start : start + split_size], dtype=np.float64)
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    return float(np.mean(scores))


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared Euclidean distances (len(rows), len(columns)), float64."""
    rows, columns = rows.double(), columns.double()
    return (rows.square().sum(1)[:, None] - 2 * rows @ columns.T + columns.square().sum(1)[None]).clamp(min=0)


def manifold_radii(features: Tensor, k: int = 3, block: int = 2000) -> Tensor:
    """Squared distance of each feature vector (N, D) to its k-th nearest neighbour, itself not counted; (N,), float64."""
    # The smallest distance is that to itself, so the k-th neighbour is the (k + 1)-th smallest.
    return torch.cat([_squared_distances(part, features).kthvalue(k + 1, dim=1).values for part in features.split(block)])


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
    inside_ref = torch.zeros(len(samples), dtype=torch.bool)
    inside_samples = []
    for part in ref.split(block):
        start = sum(len(x) for x in inside_samples)
        distances = _squared_distances(part, samples)
        inside_ref |= (distances <= radii_ref[start : start + len(part), None]).any(dim=0)
        inside_samples.append((distances <= radii_samples[None]).any(dim=1))
    return inside_ref.float().mean().item(), torch.cat(inside_samples).float().mean().item()
