"""The numbers of a row: what its commands wrote, under names that stay the same from run to run.

A row's `read` is a list of sources, each with one of these keys:

    sweep:    results file of a sweep_emoji.py -> FD-emoji and speed-up of each schedule
    json:     any JSON file; `values` maps a label to the path of a number in it
    log:      log.jsonl of a training run; `values` maps a label to a column, whose last entry is taken
    printed:  label -> regular expression with one group, searched in what the commands printed; the last match is taken
    pictures: files that must be there and readable; their number is the value

`title` stands before the labels of a source. `band` is how far a number may move, relative; speed-ups move with the machine's other work.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tstitch.errors import InputError
from tstitch.files import read_json
from tstitch.presets import ROOT

QUALITY_BAND, SPEED_BAND = 0.05, 0.3


@dataclass(frozen=True)
class Value:
    """A number with its name, and how far it may move, relative."""

    label: str
    number: float
    band: float = QUALITY_BAND


def read_values(row: dict[str, Any], folder: Path) -> list[Value]:
    """All numbers of a row, from what its commands left.

    Args:
        row: an entry of experiments.yaml.
        folder: of the row, where log.txt holds what the commands printed.

    Raises:
        InputError: if a number is not where the row says.
    """
    return [value for source in row["read"] for value in _read(source, folder)]


def _read(source: dict[str, Any], folder: Path) -> list[Value]:
    title = f"{source['title']}: " if "title" in source else ""
    band = source.get("band", QUALITY_BAND)
    if "sweep" in source:
        rows = read_json(ROOT / source["sweep"])["rows"]
        quality = [Value(f"{title}{each['name']} FD-emoji", each["fd_emoji"], band) for each in rows]
        speed = [Value(f"{title}{each['name']} speed-up", each["sampling_speed_up"], SPEED_BAND) for each in rows]
        return quality + speed
    if "json" in source:
        content = read_json(ROOT / source["json"])
        return [Value(title + label, _at(content, path, source["json"]), band) for label, path in source["values"].items()]
    if "log" in source:
        return [Value(title + label, _last(ROOT / source["log"], column), band) for label, column in source["values"].items()]
    if "printed" in source:
        text = (folder / "log.txt").read_text(errors="replace")
        return [Value(title + label, _found(pattern, text), band) for label, pattern in source["printed"].items()]
    return [Value(f"{title}pictures", _count_pictures([ROOT / name for name in source["pictures"]]), 0)]


def _at(content: Any, path: list[str | int], file: str) -> float:  # noqa: ANN401  (JSON)
    try:
        for key in path:
            content = content[key]
        return float(content)
    except (KeyError, IndexError, TypeError, ValueError):
        raise InputError(f"{file} holds no number at {path}; repair the row") from None


def _last(log: Path, column: str) -> float:
    try:
        numbers = [line[column] for line in map(json.loads, log.read_text().splitlines()) if column in line]
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{log} is missing or damaged ({error})") from None
    if not numbers:
        raise InputError(f"{log} has no column {column}; repair the row")
    return float(numbers[-1])


def _found(pattern: str, text: str) -> float:
    matches = re.findall(pattern, text)
    if not matches:
        raise InputError(f"the commands printed nothing like '{pattern}'; repair the row")
    return float(matches[-1])


def _count_pictures(paths: list[Path]) -> int:
    for path in paths:
        try:
            with Image.open(path) as picture:
                picture.load()
        except OSError as error:
            raise InputError(f"{path} is no picture ({error})") from None
    return len(paths)
