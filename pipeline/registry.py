"""One way to register a component: a decorator on a class that states its own options.

A name may hold options: what is registered as `mlp{depth}x_gelu` is found as `mlp3x_gelu`, with
`depth` 3. Others add components in a plugin file or in a package with an entry point; see `plugins`.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

from fedcmp.pipeline import plugins
from fedcmp.pipeline.errors import UserError, did_you_mean, one_line
from fedcmp.pipeline.options import Component, Options, validate
from fedcmp.pipeline.plugins import Plugin

T = TypeVar("T", bound=Options)


@dataclass(frozen=True)
class _Entry(Generic[T]):
    """A registered class, and the plugin file that has it, if one has."""

    name: str
    cls: type[T]
    plugin: Plugin | None = None

    @property
    def place(self) -> str:
        if self.plugin is not None:
            return str(self.plugin.path)
        return f"{self.cls.__module__}.{self.cls.__name__}"


class Registry(Generic[T]):
    """Components of one kind, found by importing every module of one package.

    Args:
        kind: What the components are, for error messages ("strategy").
        package: Package whose modules register themselves when imported; its last part names the group
            of entry points that do so, too (`fedcmp.strategies`).
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._group = f"fedcmp.{package.rpartition('.')[2]}"
        self._classes: dict[str, type[T]] = {}
        self._others: list[_Entry[T]] = []
        self._broken: dict[str, str] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: make the class available as `name`; of a plugin, to its experiments alone."""
        own: plugins.Registered | None = sys._getframe(1).f_globals.get(plugins.OWN)

        def add(cls: type[T]) -> type[T]:
            if own is not None:
                own.append((self.kind, name, cls))
            elif self._classes.setdefault(name, cls) is not cls:
                self._others.append(_Entry(name, cls))
            return cls

        return add

    def names(self) -> list[str]:
        """Names of all components but plugins', sorted; what cannot be imported leaves out its own alone."""
        package = importlib.import_module(self._package)
        folder = self._package.removeprefix("fedcmp.").replace(".", "/")
        for module in pkgutil.iter_modules(package.__path__):
            try:
                importlib.import_module(f"{self._package}.{module.name}")
            except Exception as error:  # a module may raise anything
                self._note_broken(f"{folder}/{module.name}.py", error)
        for point in plugins.points(self._group):
            place = f"package {plugins.package_of(point)} ({self._group}: {point.value})"
            if place not in self._broken:
                try:
                    point.load()
                except (Exception, SystemExit) as error:
                    self._note_broken(place, error)
        return sorted(self._classes)

    def _note_broken(self, place: str, error: BaseException) -> None:
        self._broken[place] = f"cannot be imported: {type(error).__name__}: {one_line(error)}"

    def registered(self, name: str) -> type[T]:
        """The class of a component by one of `names`.

        Raises:
            UserError: None has this name.
        """
        known = self.names()
        if name not in known:
            raise UserError(f"no {self.kind} is called '{name}'{did_you_mean(name, known)}")
        return self._classes[name]

    def build(self, component: Component, where: str) -> T:
        """Construct a component from its configuration.

        Args:
            component: Its name and options, and the plugins that may have it.
            where: Place in the configuration, for error messages (`federate.strategy`).

        Raises:
            UserError: The name is unknown or registered twice, or an option is unknown or invalid.
        """
        entry, named = self._find(component, where)
        options: dict[str, Any] = component.model_extra or {}
        twice = sorted(named.keys() & options.keys())
        if twice:
            raise UserError(f"{where}.{twice[0]}: the name '{component.name}' sets it; remove the option")
        return validate(entry.cls, options | named, where, str(entry.plugin.path) if entry.plugin else "")

    def provenance(self, component: Component, where: str) -> dict[str, str]:
        """What identities hold of a component besides its options: the plugin that has it, if one has.

        Raises:
            UserError: As `build`.
        """
        entry, _ = self._find(component, where)
        return entry.plugin.provenance if entry.plugin else plugins.provenance_of(entry.cls, self._group)

    def written_out(self, component: Component, where: str) -> dict[str, Any]:
        """A component's name and all of its options, defaults too, as a configuration holds them.

        Raises:
            UserError: As `build`.
        """
        given = component.model_extra or {}
        _, named = self._find(component, where)
        defaults = self.build(component, where).model_dump(
            mode="json", exclude_none=True, exclude={*given, *named}
        )
        return {"name": component.name} | given | defaults

    def _find(self, component: Component, where: str) -> tuple[_Entry[T], dict[str, str]]:
        """The class registered for a name, and the options that the name holds."""
        name, entries = component.name, list(self._entries(component.plugins))
        matches = [(entry, _pattern(entry.name).fullmatch(name)) for entry in entries]
        found = [(entry, match.groupdict()) for entry, match in matches if match is not None]
        if len(found) == 1:
            return found[0]
        if found:
            places = " and ".join(entry.place for entry, _ in found)
            raise UserError(
                f"{where}.name: {self.kind} '{name}' is registered twice, by {places}; rename one"
            )
        hint = did_you_mean(name, [entry.name for entry in entries])
        hint += "".join(f"; {place} {problem}" for place, problem in self._problems(component.plugins))
        raise UserError(f"{where}.name: no {self.kind} is called '{name}'{hint}")

    def _entries(self, files: tuple[Plugin, ...]) -> Iterator[_Entry[T]]:
        for name in self.names():
            yield _Entry(name, self._classes[name])
        yield from self._others
        for plugin in files:
            for kind, name, cls in plugins.run(plugin).registered:
                if kind == self.kind:
                    yield _Entry(name, cls, plugin)

    def _problems(self, files: tuple[Plugin, ...]) -> Iterator[tuple[str, str]]:
        """Places that might have had a component, and why they have none."""
        yield from sorted(self._broken.items())
        registered = {cls.__module__.partition(".")[0] for cls in self._classes.values()}
        for point in plugins.points(self._group):
            place = f"package {plugins.package_of(point)} ({self._group}: {point.value})"
            if place not in self._broken and point.module.partition(".")[0] not in registered:
                yield place, f"registers no {self.kind}"
        for plugin in files:
            if problem := plugins.run(plugin).problem:
                yield f"plugin {plugin.path}", problem


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """What a registered name matches; `{option}` in it stands for a whole number."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>0|[1-9][0-9]*)", re.escape(name)))
