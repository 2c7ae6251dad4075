"""Checks that take minutes: make test-slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import stitch_overhead


@pytest.mark.slow
def test_a_stitched_run_costs_what_its_parts_cost(tmp_path: Path) -> None:
    stitch_overhead.main(["--rounds", "7", "--json", str(tmp_path / "out.json")])
    speeds = {row["variant"]: row["speed"]["ideal"] for row in json.loads((tmp_path / "out.json").read_text())["cases"][0]["rows"]}
    assert all(abs(speed - 1) < 0.05 for speed in speeds.values()), speeds
