"""Run every experiment on the bundled emoji models again, record what came out, and write EXPERIMENTS.md anew.

    python experiments/run.py                         # all rows of experiments/experiments.yaml: make experiments
    python experiments/run.py --only dit-order ldm-front
    python experiments/run.py --render                # the documents alone, from what is recorded

A row is a few commands and the numbers to read from what they write. Each number is recorded with the band around its first value; a number that leaves its
band, or a claim that is no longer what it was, is printed, and the exit code is then 1. A run that was killed goes on with the row that it was at. What a row
writes lies in runs/experiments/ROW.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from benchmarks.record import git_commit, processor_name
from experiments.report import RESULTS, ROWS, judge, read_rows, write_documents
from experiments.values import Value, read_values
from tstitch.cli import new_parser, run
from tstitch.errors import InputError
from tstitch.files import check_folder, read_json, write_json
from tstitch.presets import ROOT
from tstitch.results import markdown_table

WORK = ROOT / "runs" / "experiments"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    group = parser.add_argument_group("what is run")
    group.add_argument("--only", nargs="+", metavar="ROW", help="these rows alone")
    group.add_argument("--render", action="store_true", help="run nothing; write EXPERIMENTS.md and the tables in the READMEs from what is recorded")
    group.add_argument("--new-bands", action="store_true", help="lay the bands of the rows that are run around their new values")
    return parser.parse_args(argv)


def execute(row: dict[str, Any], log: Path) -> int:
    """Run a row's commands, their output into `log`; the status of the first that fails, or 0."""
    with log.open("ab") as file:
        for command in row["emoji"]:
            file.write(f"\n$ {command}\n".encode())
            file.flush()
            # The environment's own python, torchrun and pytest, as after `source .venv/bin/activate`.
            script = f'PATH="{Path(sys.executable).parent}:$PATH"\n{command}'
            status = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
            if status:
                return status
    return 0


def bands(values: list[Value], recorded: dict[str, dict[str, float]], *, anew: bool) -> tuple[dict[str, dict[str, float]], list[list[str]]]:
    """What is recorded of a row, label -> value, low, high; and the lines of those values that left the band that they had."""
    kept, outside = {}, []
    for value in values:
        band = recorded.get(value.label)
        if band is None or anew:
            low, high = sorted((value.number * (1 - value.band), value.number * (1 + value.band)))
        else:
            low, high = band["low"], band["high"]
        if not low <= value.number <= high:
            outside.append([value.label, f"{value.number:.4g}", f"{low:.4g} to {high:.4g}"])
        kept[value.label] = {"value": value.number, "low": low, "high": high}
    gone = [[label, "not there", f"{band['low']:.4g} to {band['high']:.4g}"] for label, band in recorded.items() if label not in kept and not anew]
    return kept, outside + gone


def turned_claims(row: dict[str, Any], before: dict[str, dict[str, float]], now: dict[str, dict[str, float]]) -> list[list[str]]:
    """The lines of a row's claims that hold by the recorded numbers and not by the new ones, or the other way round."""
    try:
        held = {words: holds for words, holds, _ in judge(row, before)}
    except InputError:  # nothing is recorded, or the row has changed since
        held = {}
    return [
        [f"{words}: {shown}", "so" if holds else "not so", "so" if held[words] else "not so"]
        for words, holds, shown in judge(row, now)
        if held.get(words, holds) != holds
    ]


def begin(rows: list[dict[str, Any]], *, new_bands: bool) -> tuple[Path, dict[str, Any]]:
    """File and content of the state: of the run that was cut off, if it was to run the same rows at the same commit; else of a new one.

    A run of files that differ from their commit begins anew, since it is not known whether they are still the same.
    """
    asked, commit = {"rows": [row["id"] for row in rows], "new_bands": new_bands}, git_commit()
    path = WORK / f"state_{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]}.json"  # other rows are another run
    found = read_json(path) if path.exists() else {}
    if found.get("commit") == commit and re.fullmatch("[0-9a-f]+", commit) and set(found["done"]) != set(asked["rows"]):
        print(f"going on with {len(rows) - len(found['done'])} of {len(rows)} rows", file=sys.stderr)
        return path, found
    return path, {"asked": asked, "commit": commit, "done": [], "seconds": {}, "trouble": {}}


def prepare(data: dict[str, Any]) -> None:
    """Make the data that some rows need, where it is not there; a stage that was finished before is not run again.

    Args:
        data: `stages` of experiments.yaml, each with a `command` and the `file` that it ends with.

    Raises:
        InputError: if a stage fails.
    """
    log = WORK / "data.txt"
    for stage in data["stages"]:
        if not (ROOT / stage["file"]).exists():
            print(f"some rows need the emoji data: {stage['command']}, a few minutes; {log} has its progress", file=sys.stderr)
            if execute({"emoji": [stage["command"]]}, log):
                raise InputError(f"the emoji data could not be made; {log} says why")


def main(argv: list[str] | None = None) -> None:
    """Run, read, record, report."""
    args = parse_args(argv)
    document = read_rows()
    rows = [row for row in document["rows"] if "emoji" in row]
    if args.only:
        unknown = set(args.only) - {row["id"] for row in rows}
        if unknown:
            raise InputError(f"no rows {', '.join(sorted(unknown))} with commands in {ROWS.name}; choose from {', '.join(row['id'] for row in rows)}")
        rows = [row for row in rows if row["id"] in args.only]
    if args.render:
        missing = [row["id"] for row in rows if row["id"] not in (read_json(RESULTS) if RESULTS.exists() else {})]
        print(f"wrote {', '.join(write_documents(document))}" + (f"; not recorded: {', '.join(missing)}" if missing else ""))
        return
    check_folder(WORK)
    WORK.mkdir(parents=True, exist_ok=True)
    if any(row.get("needs_data") for row in rows):
        prepare(document["data"])
    path, state = begin(rows, new_bands=args.new_bands)
    machine = f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    with tqdm(rows, unit="row") as bar:
        for row in bar:
            name = row["id"]
            bar.set_description(name)
            if name in state["done"]:
                continue
            folder = WORK / name
            if name not in state["seconds"]:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                state["seconds"][name] = 0.0
                write_json(path, state)
            start = time.perf_counter()
            try:
                status = execute(row, folder / "log.txt")
            finally:  # a row that is cut off and goes on took both times
                state["seconds"][name] += time.perf_counter() - start
                write_json(path, state)
            recorded = read_json(RESULTS) if RESULTS.exists() else {}
            try:
                if status:
                    raise InputError(f"a command ended with {status}; {folder / 'log.txt'} says why")
                before = recorded.get(name, {}).get("values", {})
                kept, outside = bands(read_values(row, folder), before, anew=args.new_bands)
                outside += turned_claims(row, before, kept)
            except InputError as error:
                state["trouble"][name] = [["", str(error), ""]]
                write_json(path, state)
                continue
            recorded[name] = {
                "date": time.strftime("%Y-%m-%d"), "machine": machine, "commit": state["commit"], "seconds": round(state["seconds"][name]), "values": kept,
            }  # fmt: skip
            write_json(RESULTS, recorded)
            write_documents(document)
            state["done"].append(name)
            state["trouble"] |= {name: outside}
            write_json(path, state)
    trouble = [[name, *line] for name, lines in state["trouble"].items() for line in lines]
    if trouble:
        print(markdown_table(["row", "number or claim", "now", "recorded"], trouble))
        sys.exit(1)
    print(f"{len(rows)} rows, every number inside its band")


if __name__ == "__main__":
    run(main)
