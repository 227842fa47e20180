"""What the documentation names is there, and what it shows can be pasted."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import cli_reference
import click
import key_reference
import pytest
from conftest import ROOT

from fedcmp.cli import main

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("pipeline", "extract", "federate", "evaluate", "fedcmp", "configs", "tests", "docs")
# The reader's own experiment, and what README adds.
THEIRS = ("clinics", "study", "majority_vote", "exact_match", "mean_colours", "asked", "colours", "NAME", "<")
FOREIGN = {"utils.py"}  # of lmms-eval's tasks


def blocks(page: Path) -> Iterator[str]:
    """Lines of code, indented or fenced, a continued one whole."""
    fenced, text = False, page.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def inline(page: Path) -> list[str]:
    """What stands between backticks in the prose."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return [" ".join(each.split()) for each in re.findall(r"`([^`]+)`", prose)]


@cache
def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text()
    (benches,) = re.findall(r"^BENCHES := (.*)$", makefile, re.MULTILINE)
    (others,) = re.findall(r"^OTHERS := (.*)$", makefile, re.MULTILINE)
    named = others.replace("$(BENCHES:%=bench-%)", "").split()
    return {"extract", "federate", "evaluate", *named, *(f"bench-{each}" for each in benches.split())}


def slug(heading: str) -> str:
    """The anchor that a heading has on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(each) for each in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_is_there(page: Path) -> None:
    known = {file.name for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    for name in [word for each in [*inline(page), *blocks(page)] for word in each.split()]:
        name = re.sub(r"::.*|:\d+$|[,;)]+$", "", name)
        rooted = name.split("/")[0] in FOLDERS and "/" in name
        if rooted and not any(each in name for each in THEIRS) and re.fullmatch(r"[\w./*-]+", name):
            assert list(ROOT.glob(name)), f"{page.name}: {name}"
    for name in inline(page):
        if re.fullmatch(r"\w+\.py", name):
            assert name in known | FOREIGN, f"{page.name}: {name}"
        elif re.fullmatch(r"[\w/]+\.py", name) and not any(each in name for each in THEIRS):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_is_there(page: Path) -> None:
    for line in [*blocks(page), *inline(page)]:
        if line.startswith("make "):
            words = line.partition(" #")[0].split()[1:]
            unknown = {word for word in words if "=" not in word} - targets()
            assert not unknown, f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in blocks are parsed as they stand, those in the prose have a command's name."""
    monkeypatch.chdir(tmp_path)
    Path("consented.txt").touch()
    context = click.Context(main)
    for line in blocks(page):
        words = shlex.split(line.partition(" > ")[0], comments=True) if line.startswith("fedcmp ") else []
        # Usage lines have brackets and capitals alone.
        if words and "[OPTIONS]" not in words:
            command = main.get_command(context, words[1])  # type: ignore[attr-defined]
            assert command is not None, f"{page.name}: {line}"
            rest = words[2:]
            if isinstance(command, click.Group):
                command, rest = command.commands[rest[0]], rest[1:]
            command.make_context(line, rest).close()
    for each in inline(page):
        if re.match(r"fedcmp [a-z]", each):
            assert main.get_command(context, each.split()[1]) is not None, f"{page.name}: {each}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_have_the_package_s_name(page: Path) -> None:
    for module in re.findall(r"python -m ([\w.]+)", page.read_text()):
        assert module.split(".")[0] not in ("pipeline", "extract", "federate", "evaluate")
        if module.startswith("fedcmp"):
            assert importlib.util.find_spec(module) is not None, f"{page.name}: {module}"


def test_the_reference_is_of_the_commands_as_they_are() -> None:
    assert cli_reference.PAGE.read_text() == cli_reference.reference(), "make cli-reference"
    assert key_reference.PAGE.read_text() == key_reference.reference(), "make cli-reference"


@pytest.mark.parametrize(("name", "command"), list(cli_reference.commands()))
def test_every_command_and_option_is_explained(name: str, command: click.Command) -> None:
    text, example = cli_reference.parts(command)
    assert len(text.split()) > 3
    assert example.startswith(f"{name} ")
    assert all(option.help for option in cli_reference.options(command))
