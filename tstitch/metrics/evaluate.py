"""Compare samples with a reference: one pass over each file, all numbers of ADM's evaluation suite.

Memory does not grow with the number of images, but for precision and recall, which keep the features of both files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tstitch.errors import InputError
from tstitch.files import read_json
from tstitch.metrics.extractors import Extractor, open_batch
from tstitch.metrics.frechet import FeatureStatistics, frechet_distance
from tstitch.metrics.npz import Batch, Statistics
from tstitch.metrics.scores import InceptionScore, precision_recall

NEIGHBOURS = 3  # k of precision and recall

# Without these a number says little; "unknown" where the samples' settings do not name them.
WANTED = ("solver", "num_steps", "spacing", "cfg_scale", "cfg_channels", "vae")


@dataclass
class Measured:
    """What is known of one file.

    Attributes:
        pooled, spatial: mean and covariance; spatial is None where the extractor or the file has none.
        score: Inception score, or None.
        vectors: features (n, dim) of the images that precision and recall look at, on the CPU; None where they were not asked for.
    """

    pooled: Statistics
    spatial: Statistics | None
    score: float | None
    vectors: Tensor | None


def measure(batch: Batch, extractor: Extractor, batch_size: int, *, vectors: int = 0, score: bool = True) -> Measured:
    """Pass once over the images of a file, if anything is to be computed that it does not hold.

    Args:
        vectors: how many feature vectors to keep, those of the first images.
        score: whether the Inception score is wanted.
    """
    pooled, spatial, inception, kept = FeatureStatistics(extractor.dim), FeatureStatistics(extractor.spatial_dim), InceptionScore(), []
    compute = batch.pooled is None
    count = len(batch) if compute or score else min(vectors, len(batch))
    with tqdm(total=count, desc=batch.path.name, unit="image", disable=not count) as bar:
        for images in batch.images(batch_size, count) if count else ():
            features = extractor.measure(images)
            if compute:
                pooled.update(features.pool)
            if compute and features.spatial is not None:
                spatial.update(features.spatial)
            if score and features.probs is not None:
                inception.update(features.probs)
            if bar.n < vectors:
                kept.append(features.pool[: vectors - bar.n].cpu())
            bar.update(len(images))
    return Measured(
        pooled=batch.pooled or (pooled.mean, pooled.covariance),
        spatial=(spatial.mean, spatial.covariance) if spatial.totals["count"] else batch.spatial,
        score=inception.value if len(inception) else None,
        vectors=torch.cat(kept) if kept else None,
    )


def evaluate(
    reference: Path | str, samples: Path | str, extractor: Extractor, *, batch_size: int = 64, max_images: int | None = None
) -> tuple[dict[str, Any], Measured]:
    """Measure samples against a reference.

    Args:
        reference: .npz of images, statistics or both, as ADM publishes them; a folder of class folders, whose pictures are cropped to the size of the
            samples; or the name of a reference that ships with the extractor.
        samples: an .npz.
        max_images: most images of each file that precision and recall look at, the first ones; None for all.

    Returns:
        A result for `tstitch.results.comparison_table`, and what was measured of the samples. Metrics that the files do not allow are None; "notes" says why.
    """
    shipped = extractor.references()
    ours = open_batch(samples, extractor)
    theirs = None if str(reference) in shipped else open_batch(reference, extractor, image_size=ours.shape[1] if ours.shape else None)
    limit = max_images or max(len(ours), len(theirs or ()))
    counts = [min(limit, len(theirs or ())), min(limit, len(ours))]
    neighbours = min(counts) > NEIGHBOURS
    settings = sample_settings(ours.path)
    if theirs is None:
        reference_hash = f"{reference} of extractor {extractor.weights}"
        wanted = Measured(shipped[str(reference)], None, None, None)
    else:
        reference_hash = theirs.hash()
        wanted = measure(theirs, extractor, batch_size, vectors=counts[0] if neighbours else 0, score=False)
    got = measure(ours, extractor, batch_size, vectors=counts[1] if neighbours else 0)

    metrics: dict[str, float | None] = {extractor.distance: frechet_distance(*got.pooled, *wanted.pooled)}
    notes = []
    if extractor.spatial_dim:
        metrics["sfid"] = frechet_distance(*got.spatial, *wanted.spatial) if got.spatial and wanted.spatial else None
        if metrics["sfid"] is None:
            notes.append("sfid was not measured: it needs images, or mu_s and sigma_s, in both files")
    metrics[extractor.score] = got.score
    if got.score is None:
        notes.append(f"{extractor.score} was not measured: it needs images of the samples")
    metrics["precision"] = metrics["recall"] = None
    if wanted.vectors is not None and got.vectors is not None:
        # Distances are float64, which mps lacks.
        where = extractor.device if extractor.device.type == "cuda" else torch.device("cpu")
        metrics["precision"], metrics["recall"] = precision_recall(wanted.vectors.to(where), got.vectors.to(where), NEIGHBOURS)
    else:
        notes.append(f"precision and recall were not measured: they need more than {NEIGHBOURS} images in both files, statistics do not do")
    if len(ours) and len(ours) <= extractor.dim:
        notes.append(f"{extractor.distance} of {len(ours)} images is too high: a covariance of {extractor.dim} features needs far more images than that")
    own = {
        "num_images": len(ours) or settings.get("num_images", "unknown"),
        "extractor": extractor.name,
        "extractor_weights": extractor.weights,
        "reference": reference_hash,
        "reference_statistics": "stored" if theirs is None or theirs.pooled else "computed",
        "precision_recall_images": counts if neighbours else None,
    }
    result = {
        "name": ours.path.stem,
        "metrics": metrics,
        "settings": dict.fromkeys(WANTED, "unknown") | settings | own,
        "notes": notes,
        "reference": str(reference),
        "samples": str(samples),
        "torch": torch.__version__,
    }
    return result, got


def sample_settings(samples: Path) -> dict[str, Any]:
    """Settings that the generator wrote to the .json beside the samples, {} where there is none.

    Raises:
        InputError: if the file is no JSON object.
    """
    path = samples.with_suffix(".json")
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise InputError(f"{path} is no table of settings; repair or remove it")
    settings = content.get("settings", content)
    weights = content.get("weights", {})
    known = {"vae": weights.get("vae", "unknown")} | {key: content[key] for key in ("dtype", "class_labels") if key in content}
    return known | settings
