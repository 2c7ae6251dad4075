"""EXPERIMENTS.md says what was recorded, a number that leaves its band is found, and a run that was killed goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experiments import report, run
from experiments.report import DOCUMENT, RESULTS, fill_places, fill_sentence, judge, read_rows, render, verdict
from experiments.run import turned_claims
from experiments.values import Value, read_values
from tstitch.errors import InputError
from tstitch.files import read_json
from tstitch.presets import ROOT

ROWS = read_rows()["rows"]


def test_the_document_is_what_the_rows_and_their_record_make() -> None:
    assert DOCUMENT.read_text() == render(read_rows(), read_json(RESULTS))


def test_the_tables_in_readmes_are_those_of_the_record() -> None:
    texts = [(ROOT / name).read_text() for name in report.READMES]
    assert sum(text.count("<!-- sweep: ") for text in texts) >= 4
    assert sum(text.count("<!-- outcomes: ") for text in texts) >= 1
    assert [fill_places(text, read_rows(), read_json(RESULTS)) for text in texts] == texts


def test_every_row_with_a_command_has_a_result_inside_its_band() -> None:
    recorded = read_json(RESULTS)
    assert {row["id"] for row in ROWS if "emoji" in row} == set(recorded)
    for name, row in recorded.items():
        assert re.fullmatch(r"[0-9a-f]{7,}", row["commit"]), name
        assert row["values"] and all(value["low"] <= value["value"] <= value["high"] for value in row["values"].values()), name


def test_every_row_belongs_to_a_group_and_names_scripts_that_exist() -> None:
    groups = [group["id"] for group in read_rows()["groups"]]
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row["group"] in groups
        assert ("emoji" in row) != ("why_not" in row), row["id"]
        published = row.get("published", [])
        for command in [*row.get("emoji", []), *(published if isinstance(published, list) else [])]:
            scripts = re.findall(r"(?<!\S)(?:dit|sit|ldm|sd|benchmarks|tests)/\S+\.py", command)
            assert scripts or command.startswith("python -c"), command
            assert all(list(ROOT.glob(script)) for script in scripts), command


def test_every_kind_of_source_is_read(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"rows": [{"name": "L:100", "fd_emoji": 2.5, "sampling_speed_up": 1.0}]}))
    (tmp_path / "any.json").write_text(json.dumps({"a": [{"b": 7}]}))
    (tmp_path / "log.jsonl").write_text('{"loss": 3}\n{"loss": 2}\n{"fd": 9}\n')
    (tmp_path / "log.txt").write_text("1 passed\n12 passed\n")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    sources = [
        {"sweep": str(tmp_path / "sweep.json"), "title": "DDIM"},
        {"json": str(tmp_path / "any.json"), "values": {"seven": ["a", 0, "b"]}, "band": 0.5},
        {"log": str(tmp_path / "log.jsonl"), "values": {"loss": "loss"}},
        {"printed": {"tests": r"(\d+) passed"}},
        {"pictures": [str(tmp_path / "a.png")]},
    ]
    found = read_values({"read": sources}, tmp_path)
    numbers = {"DDIM: L:100 FD-emoji": 2.5, "DDIM: L:100 speed-up": 1, "seven": 7, "loss": 2, "tests": 12, "pictures": 1}
    assert {value.label: value.number for value in found} == numbers
    for broken in ({"json": str(tmp_path / "any.json"), "values": {"x": ["a", 1]}}, {"printed": {"x": "(z+)"}}, {"pictures": [str(tmp_path / "none.png")]}):
        with pytest.raises(InputError):
            read_values({"read": [broken]}, tmp_path)


def test_a_number_that_leaves_its_band_or_is_gone_is_named_and_keeps_the_band() -> None:
    first, outside = run.bands([Value("a", 2.0, 0.1), Value("b", -4.0, 0.5)], {}, anew=False)
    assert not outside
    assert (first["b"]["low"], first["b"]["high"]) == (-6, -2)
    assert not run.bands([Value("a", 2.15, 0.1), Value("b", -3.0, 0.5)], first, anew=False)[1]
    second, outside = run.bands([Value("a", 2.3, 0.1)], first, anew=False)
    assert [line[0] for line in outside] == ["a", "b"]
    assert second["a"] == {"value": 2.3, "low": first["a"]["low"], "high": first["a"]["high"]}
    assert run.bands([Value("a", 2.3, 0.1)], first, anew=True) == ({"a": {"value": 2.3, "low": 2.3 * 0.9, "high": 2.3 * 1.1}}, [])


def test_a_sentence_takes_its_numbers_from_the_record() -> None:
    values = {"L FD-emoji": {"value": 2.0}, "S FD-emoji": {"value": 2.5}, "tests": {"value": 12.0}}
    assert fill_sentence("{L FD-emoji} to {S FD-emoji / L FD-emoji - 1}, {tests}", values) == "2 to +25.0 %, 12"
    with pytest.raises(InputError, match="asks for 'B'"):
        fill_sentence("{B}", values)


def test_whether_a_claim_holds_follows_from_the_numbers() -> None:
    values = {"a": {"value": 2.0}, "b": {"value": 2.1}, "speed": {"value": 1.5}}
    claims = {
        "b costs at most 6 %": ["{b / a - 1} < 6 %"],
        "b costs at most 4 %": ["{b / a - 1} < 4 %"],
        "in order, and fast": ["{a} < {b} < 3", "1.6 < {speed}"],
    }
    row = {"claims": claims}
    assert judge(row, values) == [
        ("b costs at most 6 %", True, "+5.0 % < 6 %"),
        ("b costs at most 4 %", False, "+5.0 % < 4 %"),
        ("in order, and fast", False, "2 < 2.10 < 3; 1.6 < 1.50"),
    ]
    assert verdict(row, {"values": values}) == "1 of 3"
    assert verdict({}, {"values": values}) == verdict(row, None) == verdict(row, {"values": {}}) == "-"
    turned = turned_claims(row, values, values | {"a": {"value": 1.9}})
    assert [line[1:] for line in turned] == [["not so", "so"]]
    assert turned[0][0].startswith("b costs at most 6 %")
    assert not turned_claims(row, {}, values)


def test_a_row_says_of_how_many_pictures_its_fd_emoji_is() -> None:
    row = {"emoji": ["a --num-images 1000", "b --num-images 1000"], "found": "{L FD-emoji}."}
    values = {"L FD-emoji": {"value": 2.5}}
    assert report.outcome(row, {"values": values}) == "2.50. FD-emoji of 1,000 pictures."
    assert report.outcome(row | {"emoji": ["a --num-images 1000", "b --num-images 200"]}, {"values": values}) == "2.50."
    assert report.outcome(row | {"found": "{loss}."}, {"values": {"loss": {"value": 2.5}}}) == "2.50."


def test_every_claim_is_about_recorded_numbers() -> None:
    recorded = read_json(RESULTS)
    assert sum(len(judge(row, recorded[row["id"]]["values"])) for row in ROWS if "claims" in row) >= 50


def test_a_run_that_was_cut_off_goes_on_with_the_row_that_it_was_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    counted, gate = tmp_path / "counted", tmp_path / "gate"

    def row(name: str, command: str) -> dict[str, Any]:
        return {"id": name, "emoji": [command], "read": [{"printed": {"x": r"x = ([\d.]+)"}}]}

    rows = [row("first", f"echo x = 3; echo again >> {counted}"), row("second", f"test -e {gate}; echo x = 4")]
    monkeypatch.setattr(run, "read_rows", lambda: {"rows": rows})
    monkeypatch.setattr(run, "write_documents", lambda document: None)
    monkeypatch.setattr(run, "git_commit", lambda: "0123abc")
    for name, path in (("WORK", tmp_path / "work"), ("RESULTS", tmp_path / "results.json")):
        monkeypatch.setattr(run, name, path)

    def run_with_trouble() -> str:
        with pytest.raises(SystemExit) as stopped:
            run.main([])
        assert stopped.value.code == 1
        return capsys.readouterr().out

    assert "a command ended with 1" in run_with_trouble()
    gate.touch()
    run.main(["--only", "second"])  # another run: the first keeps its place
    run.main([])
    assert counted.read_text() == "again\n"
    recorded = read_json(tmp_path / "results.json")
    assert {name: each["values"]["x"]["value"] for name, each in recorded.items()} == {"first": 3, "second": 4}

    # All rows are done: this is a new run. What left its band in the part that was cut off is named at the end.
    rows[0]["emoji"] = ["echo x = 3.5"]
    gate.unlink()
    assert "2.85 to 3.15" in run_with_trouble()
    gate.touch()
    assert "2.85 to 3.15" in run_with_trouble()
    run.main(["--only", "first", "--new-bands"])
    assert read_json(tmp_path / "results.json")["first"]["values"]["x"]["low"] == 3.5 * 0.95
    made = tmp_path / "made"
    data = {"stages": [{"file": str(made), "command": f"echo once >> {made}"}, {"file": str(tmp_path / "never"), "command": "false"}]}
    for _ in range(2):
        with pytest.raises(InputError, match="could not be made"):
            run.prepare(data)
    assert made.read_text() == "once\n"
    with pytest.raises(InputError, match="no rows third"):
        run.main(["--only", "third"])
