"""Tables of measured quality by schedule, and what must agree before two of their numbers may stand side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tstitch.files import read_json
from tstitch.schedule import StitchSchedule


def quality_by_schedule(path: Path | None, settings: dict[str, Any], metric: str = "fd_emoji") -> dict[str, float]:
    """Read a results file: schedule (as JSON) -> metric, {} if there is no file or it was measured under other settings.

    Args:
        path: a file with "settings" and "rows", each row with a "schedule" and its metrics.
        settings: the settings of the run that the numbers are to be shown beside.
    """
    if path is None or not path.exists():
        return {}
    table = read_json(path)
    if any(table["settings"].get(key) != value for key, value in settings.items()):
        return {}
    return {StitchSchedule.from_json(row["schedule"]).to_json(): row[metric] for row in table["rows"]}


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a table with aligned columns, readable as text and as Markdown."""
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, ["-" * (w - 1) + ":" for w in widths], *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
