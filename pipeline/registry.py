"""One way to register a component: a decorator on a class that states its own options."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pipeline.config import Component, Options, validate
from pipeline.errors import UserError, did_you_mean

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
        """Names of all components, sorted."""
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        return sorted(self._classes)

    def build(self, component: Component, where: str) -> T:
        """Construct a component from its configuration.

        Args:
            component: Its name and options.
            where: Place in the configuration, for error messages (`federate.strategy`).

        Raises:
            UserError: The name is unknown, or an option is unknown or invalid.
        """
        if component.name not in self.names():
            hint = did_you_mean(component.name, self._classes)
            raise UserError(f"{where}.name: no {self.kind} is called '{component.name}'{hint}")
        options: dict[str, Any] = component.model_extra or {}
        return validate(self._classes[component.name], options, where)
