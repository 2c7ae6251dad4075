"""Arrows point one way: the core uses no backbone, and backbones do not know each other, but that a SiT is a DiT."""

from __future__ import annotations

from pathlib import Path

import pytest

from assets import draw_architecture
from assets.draw_architecture import PARTS, TOP, uses

ALLOWED = {"tstitch": set(), "dit": {"tstitch"}, "sit": {"tstitch", "dit"}, "ldm": {"tstitch"}, "sd": {"tstitch"}}


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_uses_what_lies_below_it_alone(part: str) -> None:
    assert uses(part) <= ALLOWED[part]


def test_every_part_that_is_drawn_is_a_core_a_backbone_or_on_top() -> None:
    assert set(PARTS) == set(ALLOWED) | set(TOP)
    assert "tstitch" in uses("dit")
    assert {"dit", "sit", "ldm", "sd"} <= uses("sd/page")


def test_the_picture_of_the_readme_is_the_one_that_the_imports_make(tmp_path: Path) -> None:
    draw_architecture.main(["--out", str(tmp_path / "architecture.svg")])
    shipped = draw_architecture.ROOT / "assets" / "figures" / "architecture.svg"
    assert shipped.read_text() == (tmp_path / "architecture.svg").read_text()
