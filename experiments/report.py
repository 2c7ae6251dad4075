"""EXPERIMENTS.md, and tables inside the READMEs: written from the rows and what was recorded of them, never by hand.

In a README a sweep's table stands between `<!-- sweep: FILE -->` and `<!-- end -->`, what came out of some rows between `<!-- outcomes: ROW ROW -->` and
`<!-- end -->`. In a row's sentence `{label}` is the recorded number of that label, `{a / b - 1}` the change from b to a. A row's `claims` map words to chains
of such numbers, `{a} < {b} < 1.5`, all of which must hold: whether the words are so on the emoji models follows from the record.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tstitch.emoji_sweep import sweep_table
from tstitch.errors import InputError
from tstitch.files import atomic_path, read_json
from tstitch.presets import ROOT
from tstitch.results import markdown_table

FOLDER = Path(__file__).resolve().parent
ROWS, RESULTS = FOLDER / "experiments.yaml", FOLDER / "results.json"
DOCUMENT = ROOT / "EXPERIMENTS.md"
READMES = ("README.md", "sit/README.md", "ldm/README.md", "sd/README.md")


def read_rows() -> dict[str, Any]:
    """experiments.yaml: a preface, the data that rows need, groups, and the rows in their order."""
    return OmegaConf.to_container(OmegaConf.load(ROWS), resolve=True)


def number(value: float) -> str:
    """Three significant digits, four where a number is nearly 1, whole numbers whole."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4f}" if 0.99 < value < 1 else f"{value:#.3g}".rstrip(".")


def recorded_number(label: str, values: dict[str, dict[str, float]]) -> tuple[float, str]:
    """The recorded number of a label, and how it is written; of "a / b - 1" the change from b to a, in per cent.

    Raises:
        InputError: if there is no number of that label.
    """
    try:
        if label.endswith(" - 1"):
            above, below = label.removesuffix(" - 1").split(" / ")
            change = values[above]["value"] / values[below]["value"] - 1
            return change, f"{100 * change:+.1f} %"
        return values[label]["value"], number(values[label]["value"])
    except (KeyError, ValueError):
        raise InputError(f"a row asks for '{label}', which is not recorded; choose from {', '.join(values)}") from None


def fill_sentence(text: str, values: dict[str, dict[str, float]]) -> str:
    """Put recorded numbers into a sentence.

    Raises:
        InputError: if there is no number of a label.
    """
    return re.sub(r"\{([^{}]+)\}", lambda match: recorded_number(match[1], values)[1], text)


def judge(row: dict[str, Any], values: dict[str, dict[str, float]]) -> list[tuple[str, bool, str]]:
    """A row's claims: the words, whether they are so by these numbers, and the comparisons with the numbers in them.

    Raises:
        InputError: if there is no number of a label.
    """

    def term(text: str) -> float:
        if text.startswith("{"):
            return recorded_number(text[1:-1], values)[0]
        return float(text.removesuffix(" %")) / 100 if text.endswith(" %") else float(text)

    judged = []
    for words, chains in row.get("claims", {}).items():
        holds = all(low < high for chain in chains for low, high in pairwise(map(term, chain.split(" < "))))
        judged.append((words, holds, "; ".join(fill_sentence(chain, values) for chain in chains)))
    return judged


def values_table(values: dict[str, dict[str, float]]) -> str:
    """Numbers of a row: schedules with FD-emoji and speed-up side by side, then all others."""
    named = [label.removesuffix(" FD-emoji") for label in values if label.endswith(" FD-emoji")]
    schedules = {name: (f"{name} speed-up", f"{name} FD-emoji") for name in named if f"{name} speed-up" in values}
    beside = {label for labels in schedules.values() for label in labels}
    others = [label for label in values if label not in beside]
    parts = []
    if schedules:
        cells = [[name, *(f"{values[label]['value']:.2f}" for label in labels)] for name, labels in schedules.items()]
        parts.append(markdown_table(["schedule", "speed-up", "FD-emoji"], cells))
    if others:
        parts.append(markdown_table(["number", "recorded"], [[label, number(values[label]["value"])] for label in others]))
    return "\n\n".join(parts)


def _commands(commands: list[str]) -> str:
    return "```bash\n" + "\n".join(commands) + "\n```"


def count_pictures(row: dict[str, Any], values: dict[str, Any]) -> str:
    """What FD-emoji was computed of, where one number of pictures holds for all of a row; it is comparable only at the same."""
    counts = set(re.findall(r"--(?:num-images|num-fid-samples|eval-images) (\d+)", " ".join(row["emoji"])))
    return f" FD-emoji of {int(counts.pop()):,} pictures." if len(counts) == 1 and any("FD-emoji" in label for label in values) else ""


def outcome(row: dict[str, Any], recorded: dict[str, Any] | None) -> str:
    """What came out, or why there is nothing, in a sentence or two."""
    if "emoji" not in row:
        return f"Not run: {row['why_not']}"
    try:
        return fill_sentence(row["found"], recorded["values"]) + count_pictures(row, recorded["values"]) if recorded else "Not recorded yet."
    except InputError:  # the row has changed since
        return "Not recorded yet in this form."


def verdict(row: dict[str, Any], recorded: dict[str, Any] | None) -> str:
    """How many of a row's claims hold on the emoji models."""
    try:
        judged = judge(row, recorded["values"]) if recorded else []
    except InputError:  # the row has changed since
        return "-"
    held = sum(holds for _, holds, _ in judged)
    return "-" if not judged else "yes" if held == len(judged) else "no" if held == 0 else f"{held} of {len(judged)}"


def section(row: dict[str, Any], recorded: dict[str, Any] | None) -> str:
    """One experiment: what it shows, its commands, its numbers."""
    published = _commands(row["published"]) if isinstance(row.get("published"), list) else row.get("published", "There is none.")
    parts = [f"### {row['title']}", f'<a id="{row["id"]}"></a>{row["shows"]} Source: {row["source"]}.']
    parts += [f"Published: {row['number']}. With published weights:", published]
    parts += ["With the emoji models:", _commands(row["emoji"])] if "emoji" in row else []
    parts.append(outcome(row, recorded))
    if recorded is None:
        return "\n\n".join(parts)
    if verdict(row, recorded) != "-":
        parts.append("\n".join(f"- {'so here' if holds else '**not so here**'}: {words} ({shown})" for words, holds, shown in judge(row, recorded["values"])))
    where = f"{recorded['date']}, commit {recorded['commit']}, {recorded['machine']}, {recorded['seconds'] / 60:.1f} min"
    return "\n\n".join([*parts, values_table(recorded["values"]), where + "."])


def render(document: dict[str, Any], results: dict[str, Any]) -> str:
    """EXPERIMENTS.md as a text."""
    parts = ["# Experiments", document["preface"].strip()]
    for group in document["groups"]:
        members = [row for row in document["rows"] if row["group"] == group["id"]]
        lines = [
            f"| [{row['title']}](#{row['id']}) | {row['shows']} | {outcome(row, results.get(row['id']))} | {verdict(row, results.get(row['id']))} |"
            for row in members
        ]
        parts += [
            f"## {group['title']}",
            "\n".join(["| experiment | what was published or expected | on the emoji models | so here? |", "|---|---|---|---|", *lines]),
        ]
        parts += [section(row, results.get(row["id"])) for row in members]
    return "\n\n".join(parts) + "\n"


def fill_places(text: str, document: dict[str, Any], results: dict[str, Any]) -> str:
    """A README with its tables written anew."""

    def table(match: re.Match[str]) -> str:
        kind, words = match[2], match[3]
        if kind == "sweep":
            made = sweep_table(read_json(ROOT / words)["rows"])
        else:
            rows = {row["id"]: row for row in document["rows"]}
            lines = [
                f"| {rows[name]['title']} | {outcome(rows[name], results.get(name))} | `python experiments/run.py --only {name}` |" for name in words.split()
            ]
            made = "\n".join(["| experiment | on the emoji models | again with |", "|---|---|---|", *lines])
        return f"{match[1]}{made}\n{match[4]}"

    return re.sub(r"(<!-- (sweep|outcomes): ([^>]+) -->\n).*?(<!-- end -->)", table, text, flags=re.DOTALL)


def write_documents(document: dict[str, Any]) -> list[str]:
    """Write EXPERIMENTS.md and the READMEs' tables from what is recorded; the names of the files."""
    results = read_json(RESULTS) if RESULTS.exists() else {}
    texts = {DOCUMENT: render(document, results)} | {ROOT / name: fill_places((ROOT / name).read_text(), document, results) for name in READMES}
    for path, text in texts.items():
        with atomic_path(path) as temporary:
            temporary.write_text(text)
    return [str(path.relative_to(ROOT)) for path in texts]
