"""What every table of an experiment file is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
)

from fedcmp.pipeline.errors import UserError, did_you_mean
from fedcmp.pipeline.plugins import Plugin

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Options(BaseModel):
    """Base of everything configurable: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Component(BaseModel):
    """A registered component: its name, and its own options as the remaining keys."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str
    _built: dict[str, Any] | None = PrivateAttr(None)
    _plugins: tuple[Plugin, ...] = PrivateAttr(())
    _provenance: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """Plugin files of its experiment, which may have the component."""
        return self._plugins

    @property
    def provenance(self) -> dict[str, str]:
        """What identities hold of the plugin that has the component; empty where none has."""
        return self._provenance

    def with_plugins(self, plugins: tuple[Plugin, ...]) -> Self:
        """The same component, looked for in plugin files, too."""
        copy = self.model_copy()
        copy._plugins = plugins
        return copy

    def note_plugins(self, plugins: tuple[Plugin, ...]) -> None:
        """Keep the plugin files of the experiment."""
        self._plugins = plugins

    def note_built(self, component: Options, provenance: dict[str, str]) -> None:
        """Keep all options, defaults included, as the component's own class has them, and its plugin."""
        self._built = {"name": self.name, **component.model_dump(mode="json"), **provenance}
        self._provenance = provenance

    def as_built(self) -> dict[str, Any]:
        """JSON value of the name, of all options and of the plugin, as identities hold them.

        Raises:
            RuntimeError: The experiment was read, but its components were not built (`fedcmp.load` does).
        """
        if self._built is None:
            raise RuntimeError(f"component '{self.name}' was not built; load the experiment by fedcmp.load")
        return self._built


Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], values: Mapping[str, Any], where: str, source: str = "") -> Model:
    """Validate values, turning the first problem into one clear sentence.

    Raises:
        UserError: Naming the key, the value and, for unknown keys, what was probably meant.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(([where] if where else []) + location)
    place = f"{source}: " if source else ""
    if problem["type"] == "extra_forbidden":
        known = _fields(model, location[:-1])
        raise UserError(f"{place}unknown key '{key}'{did_you_mean(location[-1], known)}")
    if problem["type"] == "missing":
        raise UserError(f"{place}'{key}' is missing; add it to the file or pass --set {key}=...")
    message = re.sub(r"valid dictionary.*", "table", problem["msg"]).replace("tuple", "list")
    raise UserError(f"{place}{key} = {problem['input']!r}: {message}")


def _fields(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
