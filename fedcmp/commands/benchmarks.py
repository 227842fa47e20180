"""`fedcmp benchmarks`: what stage three can ask."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fedcmp.evaluate.describe import Description
    from fedcmp.pipeline.describe import Option


@click.command()
@click.argument("name", required=False)
def benchmarks(name: str | None) -> None:
    """List the benchmarks with their options and defaults, or explain the options of one.

    An option without a default must be given; options that all benchmarks have come last. Those of
    plugin files are not listed.

    \b
    Example:
      fedcmp benchmarks vqa
      fedcmp benchmarks
    """
    from fedcmp.evaluate.benchmarks.base import BENCHMARKS
    from fedcmp.evaluate.describe import described

    if name is not None:
        ((found),) = described([name])
        _explain(found)
        return
    listed = described(BENCHMARKS.names())
    for each in listed:
        click.echo(each.name)
        _say(each.about, "  ")
        _say(_short(each.own) or "no options of its own", "    ")
    click.echo("all")
    _say(_short(listed[0].common), "    ")


def _explain(found: Description) -> None:
    _say(found.about, "")
    _say(f"Scores: {found.scores}", "")
    click.echo(f'\n[evaluate.benchmarks.NAME]\nname = "{found.name}"\n')
    for option in [*found.own, *found.common]:
        default = "required" if option.default is None else f"default: {option.default or 'none'}"
        _say(f"{option.name}: {option.takes}; {default}", "", "  ")
        if option.means:
            _say(option.means, "    ")


def _short(options: list[Option]) -> str:
    """Options as in a file, those with a default after those without."""
    required = [option.name for option in options if option.default is None]
    given = [f"{option.name} = {option.default}" for option in options if option.default]
    unset = [option.name for option in options if option.default == ""]
    return ", ".join([*required, *given, *unset])


def _say(text: str, indent: str, further: str | None = None) -> None:
    width = max(min(shutil.get_terminal_size().columns, 110), 40)
    after = indent if further is None else further
    wrapped = textwrap.TextWrapper(
        width,
        initial_indent=indent,
        subsequent_indent=after,
        break_on_hyphens=False,
        break_long_words=False,
    )
    click.echo(wrapped.fill(text))
