"""One way to register a component: a decorator on a class that states its own options.

A name may hold options: what is registered as `mlp{depth}x_gelu` is found as `mlp3x_gelu`, with
`depth` 3.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from fedcmp.pipeline.errors import UserError, did_you_mean, one_line
from fedcmp.pipeline.options import Component, Options, validate

T = TypeVar("T", bound=Options)


class Registry(Generic[T]):
    """Components of one kind, found by importing every module of one package.

    Args:
        kind: What the components are, for error messages ("strategy").
        package: Package whose modules register themselves when imported.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._classes: dict[str, type[T]] = {}
        self._broken: dict[str, str] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: make the class available as `name`."""

        def add(cls: type[T]) -> type[T]:
            other = self._classes.setdefault(name, cls)
            if other is not cls:
                raise ValueError(
                    f"{self.kind} '{name}' is registered twice: {other.__module__}.{other.__name__} "
                    f"and {cls.__module__}.{cls.__name__}; rename one"
                )
            return cls

        return add

    def names(self) -> list[str]:
        """Names of all components, sorted; a module that cannot be imported leaves out its own alone."""
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            try:
                importlib.import_module(f"{self._package}.{module.name}")
            except Exception as error:  # a module may raise anything
                self._broken[module.name] = f"{type(error).__name__}: {one_line(error)}"
        return sorted(self._classes)

    def build(self, component: Component, where: str) -> T:
        """Construct a component from its configuration.

        Args:
            component: Its name and options.
            where: Place in the configuration, for error messages (`federate.strategy`).

        Raises:
            UserError: The name is unknown, or an option is unknown or invalid.
        """
        cls, named = self._find(component.name, where)
        options: dict[str, Any] = component.model_extra or {}
        twice = sorted(named.keys() & options.keys())
        if twice:
            raise UserError(f"{where}.{twice[0]}: the name '{component.name}' sets it; remove the option")
        return validate(cls, options | named, where)

    def written_out(self, component: Component, where: str) -> dict[str, Any]:
        """A component's name and all of its options, defaults too, as a configuration holds them.

        Raises:
            UserError: As `build`.
        """
        given = component.model_extra or {}
        _, named = self._find(component.name, where)
        defaults = self.build(component, where).model_dump(
            mode="json", exclude_none=True, exclude={*given, *named}
        )
        return {"name": component.name} | given | defaults

    def _find(self, name: str, where: str) -> tuple[type[T], dict[str, str]]:
        """The class registered for a name, and the options that the name holds."""
        for known in self.names():
            match = _pattern(known).fullmatch(name)
            if match is not None:
                return self._classes[known], match.groupdict()
        hint = did_you_mean(name, self._classes)
        folder = self._package.removeprefix("fedcmp.").replace(".", "/")
        hint += "".join(
            f"; {folder}/{file}.py cannot be imported: {why}" for file, why in sorted(self._broken.items())
        )
        raise UserError(f"{where}.name: no {self.kind} is called '{name}'{hint}")


def _pattern(name: str) -> re.Pattern[str]:
    """What a registered name matches; `{option}` in it stands for a whole number."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>0|[1-9][0-9]*)", re.escape(name)))
