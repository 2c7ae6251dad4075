"""What a benchmark leaves behind: one JSON file for each benchmark and kind of machine, a case for each thing measured, and its table.

A file is `benchmarks/results/<benchmark>_<cpu, or the GPU's name>.json`. Each case says for itself when, where and at which commit it was measured, so a
run that measures some cases anew leaves the others as they are, and a run that is killed keeps the cases that it had finished.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import PRODUCT, Call, Comparison, compare, product_flops
from tstitch.cli import parse_device, positive_int
from tstitch.errors import InputError
from tstitch.files import check_folder, read_json, write_json
from tstitch.presets import ROOT
from tstitch.results import markdown_table

RESULTS = ROOT / "benchmarks" / "results"


def machine_kind(device: torch.device) -> str:
    """Last part of a result file's name: cpu, mps, or the GPU's name in small letters."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"\W+", "_", torch.cuda.get_device_name(device)).lower()


def processor_name() -> str:
    """Model of the CPU."""
    try:
        return re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """What ratios depend on besides the code."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"device": gpu or device.type, "cpu": processor_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def git_commit() -> str:
    """Short name of the commit, with "-dirty" where files differ from it that are neither results nor documents; "unknown" outside of git."""
    git = ["git", "-C", str(ROOT)]
    written = ["benchmarks/results", "experiments/results.json", "pretrained_models/emoji/*_results*", "*.md"]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", *(f":(exclude){path}" for path in written)], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def add_bench_args(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the words that every benchmark shares; `Record` reads them."""
    group = parser.add_argument_group("measuring")
    group.add_argument("--rounds", type=positive_int, default=rounds, help="samples of each variant")
    group.add_argument("--no-gate", action="store_true", help="keep samples that other work on this machine disturbed")
    group.add_argument("--json", type=Path, metavar="PATH", help="where the figures go (default: benchmarks/results/<benchmark>_<machine>.json)")
    if not any("--device" in action.option_strings for action in parser._actions):
        group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


class Record:
    """The file of one benchmark.

    Args:
        benchmark: its name.
        args: what `add_bench_args` asked for.

    Raises:
        InputError: if the device is not there, or the file is none of ours or could not be written.
    """

    def __init__(self, benchmark: str, args: argparse.Namespace) -> None:
        self.benchmark, self.args = benchmark, args
        self.device = parse_device(args.device)
        self.path: Path = args.json or RESULTS / f"{benchmark}_{machine_kind(self.device)}.json"
        check_folder(self.path.parent)
        self.measured: list[str] = []
        if self.path.exists():
            read_cases(self.path)

    def compare(self, calls: Mapping[str, Call]) -> Comparison:
        """Time variants against each other, as the command line asks for."""
        return compare(calls, self.device, self.args.rounds, gate=not self.args.no_gate)

    def measure(
        self,
        case: str,
        calls: Mapping[str, Call],
        *,
        against: Mapping[str, Mapping[str, str]],
        settings: Mapping[str, Any],
        flops: Mapping[str, tuple[float, str]] | None = None,
        notes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Comparison:
        """Compare variants and write the case; arguments as in `add`."""
        comparison = self.compare(calls)
        self.add(case, comparison, against=against, settings=settings, flops=flops, notes=notes)
        return comparison

    def add(
        self,
        case: str,
        comparison: Comparison,
        *,
        against: Mapping[str, Mapping[str, str]],
        settings: Mapping[str, Any],
        flops: Mapping[str, tuple[float, str]] | None = None,
        notes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Write a case, in place of an older one of its name.

        Args:
            case: name that tells it from the benchmark's other cases on the same machine.
            against: variant -> what its reference is called in the table -> the reference. A variant that is not named has no ratio.
            settings: what was run.
            flops: variant -> FLOPs of a call, and the matrix product that they are a fraction of.
            notes: variant -> further columns.
        """
        rows = []
        for name in comparison.seconds:
            if name.startswith(PRODUCT):
                continue
            row: dict[str, Any] = {"variant": name, "seconds": comparison.median(name)}
            row["speed"] = {label: comparison.speed(name, reference) for label, reference in against.get(name, {}).items()}
            if flops and name in flops:
                amount, product = flops[name]
                row |= {"flops": amount, "of_peak": comparison.of_peak(name, amount, product)}
            rows.append(row | {"notes": dict((notes or {}).get(name, {})), "of_rounds": comparison.seconds[name]})
        found = {
            "case": case, "settings": dict(settings), **machine(self.device), "date": time.strftime("%Y-%m-%d"), "commit": git_commit(),
            "rounds": len(rows[0]["of_rounds"]), "discarded": comparison.discarded, "gated": comparison.gated,
            "peak_flops_per_s": {name: product_flops(name) / comparison.median(name) for name in comparison.seconds if name.startswith(PRODUCT)},
            "rows": rows,
        }  # fmt: skip
        cases = {identity(old): old for old in (read_cases(self.path) if self.path.exists() else [])} | {identity(found): found}
        write_json(self.path, {"benchmark": self.benchmark, "cases": list(cases.values())})
        self.measured.append(case)

    def show(self) -> None:
        """Print what was measured in this run."""
        print(cases_table([case for case in read_cases(self.path) if case["case"] in self.measured]))


def identity(case: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a case from others: its name, and the machine that it was measured on."""
    return tuple(case[key] for key in ("case", "device", "cpu", "threads"))


def read_cases(path: Path) -> list[dict[str, Any]]:
    """Cases of a result file.

    Raises:
        InputError: if it cannot be read, or was not written by a `Record`.
    """
    content = read_json(path)
    if not isinstance(content, dict) or "cases" not in content:
        raise InputError(f"{path} is no record of a benchmark; name another file with --json, or remove it")
    return content["cases"]


def cases_table(cases: list[dict[str, Any]]) -> str:
    """Markdown: a table of all cases, and below it where they were measured."""
    labels = _in_order(label for case in cases for row in case["rows"] for label in row["speed"])
    columns = _in_order(column for case in cases for row in case["rows"] for column in row["notes"])
    peaks = any("of_peak" in row for case in cases for row in case["rows"])
    header = ["case", "variant", "seconds", *(f"speed / {label}" for label in labels), *(["GFLOP/s", "of peak"] if peaks else []), *columns]
    lines = []
    for case in cases:
        for row in case["rows"]:
            rate = [f"{row['flops'] / row['seconds'] / 1e9:.0f}", f"{row['of_peak']:.2f}"] if "of_peak" in row else ["", ""]
            speeds = [f"{row['speed'][label]:.3f}" if label in row["speed"] else "" for label in labels]
            lines.append([case["case"], row["variant"], f"{row['seconds']:.4g}", *speeds, *(rate if peaks else []), *(_cell(row["notes"], c) for c in columns)])
    return "\n\n".join([markdown_table(header, lines), *_in_order(_provenance(case) for case in cases)])


def _in_order(values: Any) -> list[Any]:  # noqa: ANN401  (any iterable)
    return list(dict.fromkeys(values))


def _cell(notes: Mapping[str, Any], column: str) -> str:
    value = notes.get(column, "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _provenance(case: Mapping[str, Any]) -> str:
    place = case["cpu"] if case["device"] == "cpu" else f"{case['device']}, {case['cpu']}"
    gate = "" if case["gated"] else "; disturbed samples were not looked for"
    return f"{place}, {case['threads']} threads, torch {case['torch']}, {case['date']}, commit {case['commit']}{gate}."
