"""Both container recipes say what the repository is, and tests/docker_steps.sh, which executes them without an engine, does what they say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tstitch.presets import ROOT

RECIPES = ["Dockerfile", "Dockerfile.ldm"]
STEPS = ROOT / "tests" / "docker_steps.sh"
SYSTEM = re.compile(r"\b(apt-get|useradd|userdel)\b")

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what is tracked is known in a git checkout only")


def tracked(*patterns: str) -> list[str]:
    done = subprocess.run(["git", "-C", ROOT, "ls-files", "-z", "--", *patterns], capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name]


def instructions(name: str) -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def copies(name: str) -> list[tuple[list[str], str]]:
    words = [[word for word in rest.split() if not word.startswith("--")] for kind, rest in instructions(name) if kind == "COPY"]
    return [(sources, target) for *sources, target in words]


def execute(recipe: str, tmp_path: Path, *flags: str) -> subprocess.CompletedProcess:
    file = tmp_path / "Recipe"
    file.write_text(recipe)
    return subprocess.run([STEPS, *flags, file], capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_copied_is_tracked(name: str) -> None:
    for sources, _ in copies(name):
        for source in sources:
            assert tracked(source if (ROOT / source).is_dir() else f":(glob){source}"), source


@pytest.mark.parametrize("name", RECIPES)
def test_every_folder_of_the_repository_is_copied_to_its_own_name(name: str) -> None:
    copied = {target: sources for sources, target in copies(name) if target != "./"}
    assert all(sources == [target] for target, sources in copied.items())
    hidden = {folder for folder in {Path(file).parts[0] for file in tracked("*/*")} if folder.startswith(".")}
    missing = {file for file in tracked("*/*") if Path(file).parts[0] not in hidden and not any(Path(file).is_relative_to(target) for target in copied)}
    assert not missing


@pytest.mark.parametrize("name", RECIPES)
def test_the_base_is_one_exact_release(name: str) -> None:
    bases = [rest for kind, rest in instructions(name) if kind == "FROM"]
    assert len(bases) == 1
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[\w.-]+", bases[0])


@pytest.mark.parametrize("name", RECIPES)
def test_the_container_runs_as_an_ordinary_user_by_number(name: str) -> None:
    users = [rest for kind, rest in instructions(name) if kind == "USER"]
    assert users == ["1000"]
    made = next(rest for kind, rest in instructions(name) if kind == "RUN")
    assert "useradd --uid 1000 " in made
    assert all(rest.startswith("--chown=1000 ") for kind, rest in instructions(name) if kind == "COPY")


@pytest.mark.parametrize("name", RECIPES)
def test_packages_are_installed_from_the_pins_before_anything_else_is_copied(name: str) -> None:
    steps = instructions(name)
    install = steps.index(("RUN", "make .venv/.installed"))
    assert [rest.split()[1:] for kind, rest in steps[:install] if kind == "COPY"] == [["Makefile", "requirements.txt", "./"]]
    assert not any("pip install" in rest for kind, rest in steps if kind == "RUN")


def test_both_recipes_have_one_layout() -> None:
    first, second = ([step for step in instructions(name) if step[0] != "FROM" and not SYSTEM.search(step[1])] for name in RECIPES)
    assert first == second
    assert ("CMD", '["make", "demo"]') in first
    assert ("VOLUME", '["/data", "/workspace/.cache/huggingface"]') in first


@pytest.mark.parametrize("name", RECIPES)
def test_mounted_folders_belong_to_the_user(name: str) -> None:
    made = next(rest for kind, rest in instructions(name) if kind == "RUN")
    owned = re.search(r"install --directory --owner tstitch (.*)", made)
    assert owned
    # The cache folder too: a folder that install makes on the way to another belongs to root.
    assert owned[1].split() == ["/data", "/workspace/.cache", "/workspace/.cache/huggingface"]


def test_a_good_recipe_runs_to_its_command(tmp_path: Path) -> None:
    recipe = """# a comment
FROM nowhere/image:1.2.3-slim
RUN apt-get update \\
    # between continued lines
    && useradd nobody-here
USER 1000
WORKDIR /box
ENV PLACE=/box/place WORD=word
COPY --chown=1000 requirements.txt *.toml ./
COPY assets/emoji drawings
RUN test -f requirements.txt && test -f pyproject.toml && test -f drawings/build_dataset.py && test "$WORD" = word
RUN mkdir "$PLACE" && echo "$HOME" > place/home
VOLUME ["/data"]
CMD ["sh", "-c", "cat place/home; ls -d ../data"]
"""
    done = execute(recipe, tmp_path, "--root", "image")
    assert done.returncode == 0, done.stderr
    root = tmp_path / "image"
    assert "skipped" in done.stdout
    assert done.stdout.splitlines()[-3:] == [f"{root}/box", "../data", f"{tmp_path}/Recipe: every step succeeded"]
    assert sorted(path.name for path in (root / "box").iterdir()) == ["drawings", "place", "pyproject.toml", "requirements.txt"]


def test_only_what_git_tracks_is_copied(tmp_path: Path) -> None:
    done = execute("FROM a:1.2.3-b\nWORKDIR /w\nCOPY tstitch tstitch\n", tmp_path, "--root", "image")
    assert done.returncode == 0, done.stderr
    found = {str(path.relative_to(tmp_path / "image" / "w")) for path in (tmp_path / "image" / "w").rglob("*") if path.is_file()}
    assert found == set(tracked("tstitch"))


def test_a_failing_step_stops_the_recipe_with_its_line(tmp_path: Path) -> None:
    done = execute("FROM a:1.2.3-b\n\nRUN echo before\nRUN echo here \\\n    && exit 7\nRUN echo after\nCMD echo command\n", tmp_path)
    assert done.returncode == 7
    assert "Recipe, line 4: failed with 7" in done.stderr
    assert "--> sh -c echo before" in done.stdout
    assert "after" not in done.stdout
    assert "command" not in done.stdout


def test_a_failing_command_fails_the_recipe(tmp_path: Path) -> None:
    done = execute('FROM a:1.2.3-b\nCMD ["false"]\n', tmp_path)
    assert done.returncode == 1
    assert "line 2" in done.stderr


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        ("RUN true\n", "must be FROM"),
        ("FROM a AS b\n", "plain FROM"),
        ("FROM a\nFROM b\n", "one stage"),
        ("FROM a\nCOPY no/such/file ./\n", "line 2: git tracks no no/such/file"),
        ("FROM a\nCOPY --from=b c ./\n", "COPY"),
        ("FROM a\nENV A b\n", "NAME=VALUE"),
        ("FROM a\nONBUILD RUN true\n", "ONBUILD is not understood"),
        ("FROM a\nRUN true \\\n", "in the middle"),
        ("# nothing\n", "no FROM"),
    ],
)
def test_what_is_not_understood_is_an_error(recipe: str, complaint: str, tmp_path: Path) -> None:
    done = execute(recipe, tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "every step succeeded" not in done.stdout


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "mine").write_text("mine")
    done = execute("FROM a\nRUN true\n", tmp_path, "--root", "image")
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert [path.name for path in (tmp_path / "image").iterdir()] == ["mine"]


def test_the_temporary_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    assert execute("FROM a\nWORKDIR /w\nRUN pwd\n", tmp_path).returncode == 0
    assert not list((tmp_path / "temporary").iterdir())
