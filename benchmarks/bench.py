"""The benchmarks in their quick form, all but generation.py, one process each: make bench records them, make bench-check compares them with what was recorded.

    python benchmarks/bench.py                   # writes benchmarks/results/
    python benchmarks/bench.py --check           # writes nothing; exit code 1 if a ratio fell
    python benchmarks/bench.py --only forward sweep

Only ratios are compared, each with the one that the same case had on the same kind of machine: device, CPU model, threads. One that is more than 10 % below
it is named, and so is a case that nobody recorded here. Without any record of this machine there is nothing to compare with: exit code 2.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import RESULTS, machine, machine_kind, read_cases
from tstitch.cli import new_parser, parse_device, run
from tstitch.errors import InputError
from tstitch.results import markdown_table

FALLEN = 0.9  # of the recorded ratio

EMOJI = ("emoji-small", "emoji-base", "emoji-large")
# Quick forms: the name of the script, then its words.
QUICK: list[list[str]] = [
    ["forward", "--models", "DiT-S/2", "DiT-B/2", "--batches", "2", "--rounds", "5"],
    ["sampling", "--models", "DiT-S/2", "--batch", "1", "--rounds", "3"],
    ["sweep", "--models", EMOJI[0], EMOJI[2], "--rounds", "5"],
    ["sweep", "--models", *EMOJI, "--rounds", "3"],
    ["sweep", "--models", "DiT-S/2", "DiT-B/2", "--num-steps", "5", "--rounds", "3"],
    ["unets", "--batch", "1", "--num-steps", "10", "--rounds", "5"],
    ["stitch_overhead", "--rounds", "5"],
    ["training_loop", "--rounds", "3"],
    ["train_speed", "--rounds", "3", "--batch-size", "16"],
    ["feature_loading", "--rounds", "5", "--count", "20000", "--steps", "10"],
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the record in place of writing it")
    parser.add_argument("--only", nargs="+", choices=sorted({words[0] for words in QUICK}), metavar="NAME", help="run these alone")
    parser.add_argument("--no-gate", action="store_true", help="keep samples that other work on this machine disturbed")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser.parse_args(argv)


def ratios(cases: Iterable[Mapping[str, Any]], here: Mapping[str, Any]) -> dict[tuple[str, str, str], float]:
    """(case, variant, reference) -> ratio, of the cases that were measured on a machine like this one."""
    alike = (case for case in cases if all(case[key] == here[key] for key in ("device", "cpu", "threads")))
    return {(case["case"], row["variant"], label): ratio for case in alike for row in case["rows"] for label, ratio in row["speed"].items()}


def fallen(recorded: Mapping[tuple[str, str, str], float], measured: Mapping[tuple[str, str, str], float]) -> list[list[str]]:
    """Rows of case, variant, reference, recorded, measured: the ratios that fell by more than 10 %."""
    return [[*key, f"{was:.3f}", f"{measured[key]:.3f}"] for key, was in recorded.items() if key in measured and measured[key] < FALLEN * was]


def lost(recorded: Mapping[tuple[str, str, str], float], measured: Mapping[tuple[str, str, str], float]) -> list[list[str]]:
    """The same rows of ratios that a case had and, though it was measured, has no more."""
    cases = {case for case, _, _ in measured}
    return [[*key, f"{was:.3f}", "-"] for key, was in recorded.items() if key not in measured and key[0] in cases]


def unknown(recorded: Mapping[str, Mapping[tuple[str, str, str], float]], measured: Mapping[str, Mapping[tuple[str, str, str], float]]) -> list[str]:
    """Cases, each after its benchmark's name, that were measured and have no ratio in the record."""
    cases = {f"{name}: {case}" for name, now in measured.items() for case in {key[0] for key in now} - {key[0] for key in recorded.get(name, {})}}
    return sorted(cases)


def main(argv: list[str] | None = None) -> None:
    """Run them; compare or leave the record."""
    args = parse_args(argv)
    device = parse_device(args.device)
    here, kind = machine(device), machine_kind(device)
    chosen = [words for words in QUICK if not args.only or words[0] in args.only]
    recorded = {
        name: ratios(read_cases(path), here) for name in dict.fromkeys(words[0] for words in chosen) if (path := RESULTS / f"{name}_{kind}.json").exists()
    }
    if args.check and not any(recorded.values()):
        raise InputError(f"nothing was recorded on a {kind} machine like this one ({here['cpu']}, {here['threads']} threads); record it with make bench")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if args.check else RESULTS
        failed = [words for words in tqdm(chosen, desc="benchmarks", unit="benchmark") if not _run(words, args, folder / f"{words[0]}_{kind}.json")]
        measured = {path.name.removesuffix(f"_{kind}.json"): ratios(read_cases(path), here) for path in folder.glob(f"*_{kind}.json")} if args.check else {}
    if args.check:
        compared = sum(len(was.keys() & measured.get(name, {}).keys()) for name, was in recorded.items())
        found = ((name, was, measured.get(name, {})) for name, was in recorded.items())
        rows = [[name, *row] for name, was, now in found for row in [*fallen(was, now), *lost(was, now)]]
        if rows:
            print(markdown_table(["benchmark", "case", "variant", "reference", "recorded", "now"], rows))
        print(f"{len(rows)} of {compared} ratios fell by more than 10 % or were lost")
        if new := unknown(recorded, measured):
            print(f"not compared, since make bench recorded nothing of the kind here: {'; '.join(new)}")
        if not compared and not failed:
            raise InputError("no case that was recorded here was measured again; record the quick forms with make bench")
    for words in failed:
        print(f"error: this did not run to its end: python benchmarks/{words[0]}.py {' '.join(words[1:])}", file=sys.stderr)
    if failed or (args.check and rows):
        sys.exit(1)


def _run(words: list[str], args: argparse.Namespace, path: Path) -> bool:
    common = ["--device", args.device, "--json", str(path), *(["--no-gate"] if args.no_gate else [])]
    return subprocess.run([sys.executable, str(Path(__file__).with_name(f"{words[0]}.py")), *words[1:], *common], check=False).returncode == 0


if __name__ == "__main__":
    run(main)
