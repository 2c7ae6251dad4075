"""Write the recorded figures into benchmarks/README.md, each benchmark's table in its own place.

    python benchmarks/report.py
    python benchmarks/report.py --print forward    # the table alone

A place is what stands between `<!-- results: NAME -->` and `<!-- end -->`. Every machine that has a record has a table.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import RESULTS, cases_table, read_cases
from tstitch.cli import new_parser, run
from tstitch.errors import InputError
from tstitch.files import atomic_path

README = Path(__file__).with_name("README.md")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--print", dest="name", metavar="NAME", help="print one benchmark's tables and write nothing")
    parser.add_argument("--readme", type=Path, default=README, help="document with the places")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    return parser.parse_args(argv)


def tables(name: str, folder: Path) -> str:
    """Tables of a benchmark, the CPU's first; a sentence where there is no record."""
    found = [path for path in sorted(folder.glob(f"{name}_*.json")) if path.stem.removeprefix(f"{name}_")]
    return "\n\n".join(cases_table(read_cases(path)) for path in found) or f"Not recorded yet: `python benchmarks/{name}.py`."


def fill(text: str, folder: Path) -> str:
    """The document with every place filled anew.

    Raises:
        InputError: if a place does not end.
    """
    begun, ended = len(re.findall(r"<!-- results: \w+ -->", text)), text.count("<!-- end -->")
    if begun != ended:
        raise InputError(f"{begun} places begin with <!-- results: NAME --> and {ended} end with <!-- end -->; repair the document")
    place = r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)"
    return re.sub(place, lambda match: f"{match[1]}\n{tables(match[2], folder)}\n\n{match[3]}", text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> None:
    """Fill, or print."""
    args = parse_args(argv)
    if args.name:
        print(tables(args.name, args.results))
        return
    filled = fill(args.readme.read_text(), args.results)
    with atomic_path(args.readme) as temporary:
        temporary.write_text(filled)
    print(f"wrote {args.readme}")


if __name__ == "__main__":
    run(main)
