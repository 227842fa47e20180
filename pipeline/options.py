"""What every table of an experiment file is made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr


class Options(BaseModel):
    """Base of everything configurable: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Component(BaseModel):
    """A registered component: its name, and its own options as the remaining keys."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str
    _built: dict[str, Any] | None = PrivateAttr(None)

    def note_built(self, component: Options) -> None:
        """Keep all options, defaults included, as the component's own class has them."""
        self._built = {"name": self.name, **component.model_dump(mode="json")}

    def as_built(self) -> dict[str, Any]:
        """JSON value of the name and of all options, as identities hold them.

        Raises:
            RuntimeError: The experiment was read, but its components were not built (`fedcmp.load` does).
        """
        if self._built is None:
            raise RuntimeError(f"component '{self.name}' was not built; load the experiment by fedcmp.load")
        return self._built
