"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

only_benchmarks = click.option(
    "--benchmark", "only", multiple=True, metavar="NAME", help="Only this benchmark; repeatable."
)


_KEY_OPTIONS = (
    click.option(
        "--insecure", is_flag=True, help="No encryption, within one machine or behind a proxy on it."
    ),
    click.option("--ca", type=click.Path(path_type=Path), help="Certificate authority of the server."),
)


def key_options(command: F) -> F:
    """Give a command what it needs to trust the other end."""
    for option in _KEY_OPTIONS:
        command = option(command)
    return command


def experiment_options(command: F) -> F:
    """Give a command its experiment file and `--set`."""
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable."
    )(command)
    return click.argument("config", type=click.Path(path_type=Path))(command)


def experiments_options(command: F) -> F:
    """Give a command its runs, each by its experiment file, and `--set`."""
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable."
    )(command)
    return click.argument(
        "configs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="CONFIG..."
    )(command)
