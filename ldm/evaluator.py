"""FID, sFID, Inception score, precision and recall of an .npz of samples; the same as `python -m tstitch.metrics`, which has the documentation."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tstitch.cli import run
from tstitch.metrics.__main__ import main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    run(main)
