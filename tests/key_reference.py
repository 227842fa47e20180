"""Every key of an experiment file: docs/keys.md, from the classes that read it.

make cli-reference
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from fedcmp.evaluate.benchmarks.base import BENCHMARKS
from fedcmp.extract.encoders.base import ENCODERS
from fedcmp.extract.sources import SOURCES
from fedcmp.federate.preference.rewards import REWARDS
from fedcmp.federate.preference.routers import ROUTERS
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.describe import documented, options_of
from fedcmp.pipeline.models.projectors.base import PROJECTORS
from fedcmp.pipeline.options import Component, Options
from fedcmp.pipeline.registry import Registry

PAGE = Path(__file__).parent.parent / "docs" / "keys.md"
_KINDS: dict[str, tuple[str, Registry[Any]]] = {
    "extract.silos.SILO": ("Sources", SOURCES),
    "extract.encoder": ("Encoders", ENCODERS),
    "federate.projector": ("Projectors", PROJECTORS),
    "federate.strategy": ("Strategies", STRATEGIES),
    "align.reward": ("Reward models", REWARDS),
    "align.router": ("Routers of rewards", ROUTERS),
    "evaluate.benchmarks.NAME": ("Benchmarks", BENCHMARKS),
}
_HEAD = """# Keys of an experiment file

Written by `make cli-reference` from the classes that read them. Tables first, then what may stand where a
table has a `name`. `fedcmp show FILE` prints an experiment with every default written out. Components of
plugins are not listed.
"""


def tables(cls: type[Options], place: str = "") -> Iterator[tuple[str, type[Options]]]:
    """Every table below a class, with its dotted key."""
    yield place, cls
    for name, info in cls.model_fields.items():
        for kind, many in _inside(info.annotation):
            if issubclass(kind, Options):
                part = f"{name}.{'SILO' if many else ''}".rstrip(".")
                yield from tables(kind, f"{place}.{part}".lstrip("."))


def _inside(annotation: Any, many: bool = False) -> Iterator[tuple[type, bool]]:
    """Classes in an annotation, and whether they are values of a table of tables."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type):
        yield annotation, many
    elif origin in (Union, UnionType, Annotated, dict):
        for each in arguments[:1] if origin is Annotated else arguments:
            yield from _inside(each, many or origin is dict)


def about(cls: type) -> str:
    """What a class says of itself before its arguments."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")[0]
    return "\n\n".join(" ".join(each.split()) for each in text.strip().split("\n\n"))


def rows(cls: type[Options], common: frozenset[str] = frozenset()) -> list[str]:
    """Options of a class as a table; tables in it have sections of their own."""
    inner = {
        name
        for name, info in cls.model_fields.items()
        if any(issubclass(kind, Options | Component) for kind, _ in _inside(info.annotation))
    }
    found = [each for each in options_of(cls) if each.name not in common | inner]
    if not found:
        return []
    # What keys mean stands in the text above where it does not stand beside them.
    columns = 4 if any(each.means for each in found) else 3
    lines = [["key", "value", "default", ""][:columns], ["---"] * columns]
    for each in found:
        default = "required" if each.default is None else f"`{each.default}`" if each.default else ""
        lines.append([f"`{each.name}`", each.takes, default, each.means][:columns])
    return [*(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines), ""]


def components(title: str, registry: Registry[Any], place: str) -> Iterator[str]:
    """All components of a kind; what all have stands first."""
    classes = {name: registry.registered(name) for name in registry.names()}
    shared = frozenset.intersection(*(frozenset(cls.model_fields) for cls in classes.values()))
    base = next(iter(classes.values()))
    defaults = {
        name: {
            repr(cls.model_fields[name].get_default(call_default_factory=True)) for cls in classes.values()
        }
        for name in shared
    }
    common = frozenset(name for name in shared if len(defaults[name]) == 1 and len(classes) > 1)
    yield from [f"## {title}: `[{place}]`", ""]
    if common:
        yield from ["All of them:", "", *rows(base, frozenset(base.model_fields) - common)]
    for name, cls in classes.items():
        first, _ = documented(cls)
        yield from [f"### `{name}`", "", first, "", *rows(cls, common)]


def reference() -> str:
    """The whole page."""
    lines = [_HEAD]
    for place, cls in tables(Experiment):
        lines += [f"## `[{place}]`" if place else "## At the top", "", about(cls), "", *rows(cls)]
    for place, (title, registry) in _KINDS.items():
        lines += components(title, registry, place)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference())
