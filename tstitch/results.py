"""What a result belongs to, tables of quality by schedule, and what must agree before two of their numbers may stand side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tstitch.autoencoder import weights_file
from tstitch.checkpoints import file_hash
from tstitch.cli import SamplingPlan
from tstitch.files import read_json
from tstitch.presets import DenoiserFile


def run_record(plan: SamplingPlan, files: Sequence[DenoiserFile]) -> dict[str, Any]:
    """What a run's results belong to: settings, seeds, labels, models and hashes of their weights, number type, machine."""
    return {
        "settings": plan.settings,
        "seeds": plan.noise.seeds,
        "labels": plan.labels.tolist(),
        "models": {file.letter: file.model for file in files},
        "weights": weight_hashes(plan, files),
        **computed_by(plan.dtype, plan.device),
    }


def computed_by(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What a result's last digits and its seconds depend on besides: number type, device, threads, torch."""
    return {"dtype": str(dtype).removeprefix("torch."), "device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}


def weight_hashes(plan: SamplingPlan, files: Sequence[DenoiserFile]) -> dict[str, str]:
    """Hash of each model's weights by its letter, and of the autoencoder's, whose name stands in where its file is not known."""
    vae = weights_file(plan.vae)
    return {file.letter: file_hash(file.path) for file in files} | {"vae": file_hash(vae) if vae.exists() else str(plan.vae)}


def quality_by_schedule(
    paths: Sequence[Path], settings: dict[str, Any], weights: dict[str, str], metric: str = "fd_emoji"
) -> tuple[Path | None, dict[str, float]]:
    """Find the results file that was measured under these settings and with these weights, and read schedule name -> metric; (None, {}) if none was.

    Args:
        paths: files with "settings", "weights" and "rows", each row with a "name" such as "S:40 L:60" and its metrics.
        settings: settings of the run that the numbers are to be shown beside.
        weights: name -> hash of the weights which that run uses.
    """
    for path in paths:
        table = read_json(path) if path.exists() else None
        if table and all(table[part].get(key) == value for part, wanted in (("settings", settings), ("weights", weights)) for key, value in wanted.items()):
            return path, {row["name"]: row[metric] for row in table["rows"]}
    return None, {}


def comparison_table(results: list[dict[str, Any]]) -> str:
    """Lay results side by side, and say below which settings differ or are unknown: such rows do not belong in one table.

    Args:
        results: each with a "name", "metrics" (name -> number, or None where not measured) and "settings" ("unknown" where nobody knows).
    """
    metrics = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    rows = [[result["name"], *(_number(result["metrics"].get(name)) for name in metrics)] for result in results]
    lines = [markdown_table(["samples", *metrics], rows)]
    differ, unknown = [], []
    for key in dict.fromkeys(key for result in results for key in result["settings"]):
        values = [result["settings"].get(key, "unknown") for result in results]
        if "unknown" in values:
            unknown.append(key)
        known = [value for value in values if value != "unknown"]
        if any(value != known[0] for value in known):
            differ.append(f"{key} ({' / '.join(str(value) for value in values)})")
    if differ:
        lines.append(f"Not comparable: these rows differ in {', '.join(differ)}.")
    if unknown:
        lines.append(f"Perhaps not comparable: {', '.join(unknown)} unknown for at least one row.")
    return "\n\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1 else f"{value:.3f}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a table with aligned columns, readable as text and as Markdown."""
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, ["-" * (w - 1) + ":" for w in widths], *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
