"""What every table of an experiment file is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Base of everything configurable: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Component(BaseModel):
    """A registered component: its name, and its own options as the remaining keys."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str
