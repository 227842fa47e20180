"""Every command, option and default: docs/cli.md, from the commands themselves.

make cli-reference
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from fedcmp.cli import COMMANDS, main

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
_EXAMPLE = "\b\nExample:\n"
_TYPES = {"integer": "integer", "integer range": "integer", "float": "number", "float range": "number"}
_HEAD = """# Commands

Written by `make cli-reference` from the commands' own help; `fedcmp COMMAND --help` prints the same.

`fedcmp` and `python -m fedcmp` are the same program. `--set KEY=VALUE` takes a dotted key of the experiment
file and a TOML value; what is not TOML is plain text. Exit codes:

| code | |
|---|---|
| 0 | done |
| 1 | `cache verify` or `cache diff` found something |
| 2 | an error in the call, the files or the machine, in one line |
| 130, 143 | interrupted by Ctrl-C or SIGTERM; the same command goes on |
"""


def commands() -> Iterator[tuple[str, click.Command]]:
    """All commands in the order of the stages, subcommands after their group."""
    context = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(context, name)  # type: ignore[attr-defined]
        yield f"fedcmp {name}", command
        for sub, each in getattr(command, "commands", {}).items():
            yield f"fedcmp {name} {sub}", each


def parts(command: click.Command) -> tuple[str, str]:
    """What a command does, in paragraphs, and its examples."""
    text, _, example = inspect.cleandoc(command.help or "").partition(_EXAMPLE)
    paragraphs = [" ".join(each.split()) for each in text.strip().split("\n\n")]
    return "\n\n".join(paragraphs), inspect.cleandoc(f"\n{example}")


def options(command: click.Command) -> list[click.Option]:
    """What can be set, without `--help`."""
    found = [each for each in command.params if isinstance(each, click.Option)]
    return [each for each in found if "--help" not in each.opts]


def value(option: click.Option) -> str:
    """What is written after an option: nothing, one of its choices, or a value of some type."""
    facts: dict[str, Any] = option.to_info_dict()
    kind = facts["type"]
    if facts["is_flag"]:
        return ""
    if "choices" in kind:
        return ", ".join(f"`{each}`" for each in kind["choices"])
    named = [f"`{option.metavar}`"] if option.metavar else []
    if kind["name"] in _TYPES:
        named.append(_TYPES[kind["name"]])
        if kind.get("min") is not None:
            named.append(f"{'>' if kind['min_open'] else '≥'} {kind['min']}")
        if kind.get("max") is not None:
            named.append(f"{'<' if kind['max_open'] else '≤'} {kind['max']}")
    return " ".join(named) or {"path": "path", "filename": "file"}.get(kind["name"], "text")


def default(option: click.Option) -> str:
    """What holds without the option."""
    facts = option.to_info_dict()
    if facts["required"]:
        return "required"
    return "" if facts["is_flag"] or facts["default"] in (None, ()) else f"`{facts['default']}`"


def section(name: str, command: click.Command) -> str:
    """One command in Markdown."""
    text, example = parts(command)
    usage = " ".join([name, *command.collect_usage_pieces(click.Context(command))])
    lines = [f"{'##' if name.count(' ') == 1 else '###'} {name}", "", text, "", f"    {usage}", ""]
    if found := options(command):
        lines += ["| option | value | default | |", "|---|---|---|---|"]
        lines += [f"| `{each.opts[0]}` | {value(each)} | {default(each)} | {each.help} |" for each in found]
        lines.append("")
    return "\n".join([*lines, "Example:", "", *(f"    {line}" for line in example.splitlines()), ""])


def reference() -> str:
    """The whole page."""
    contents = [f"| [`{name}`](#fedcmp-{name}) | {text} |" for name, text in COMMANDS.items()]
    head = "\n".join([_HEAD, "| command | |", "|---|---|", *contents, ""])
    return "\n".join([head, *(section(name, command) for name, command in commands())]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference())
