"""The tables of an experiment file that say what may be learnt of a silo, and where that is counted."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fedcmp.pipeline.options import Options

_MOST_TEXTS = 16


class Privacy(Options):
    """What may be learnt of a client, a text, an image or a patient from what is sent.

    With `secure` the server sees sums over clients alone; more than the share `threshold` of a round's
    clients have to stay until its end, and at least three.

    With `clip` and noise, one `unit` is differentially private: a whole `client`, whose update of a round
    may have the norm `clip`; or, within each silo, a `text`, an `image` with all its texts or a `patient`
    with all images and texts, whose gradient in a step may have it. The sum of all gets Gaussian noise of
    `noise_multiplier` clips, or of as many as a whole run takes to be (`epsilon`, `delta`)-private.

    A patient is what the regular expression `patient` finds first in the id of an image, or its one group;
    `most_texts` texts of each are trained on at most.
    """

    secure: bool = False
    threshold: float = Field(0.5, ge=0.5, lt=1)
    unit: Literal["client", "text", "image", "patient"] = "client"
    patient: str | None = None
    most_texts: int = Field(_MOST_TEXTS, ge=1)
    clip: float | None = Field(None, gt=0)
    noise_multiplier: float = Field(0.0, ge=0)
    epsilon: float | None = Field(None, gt=0)
    delta: float = Field(1e-5, gt=0, lt=1)

    @property
    def noisy(self) -> bool:
        """Whether there is any noise."""
        return self.noise_multiplier > 0 or self.epsilon is not None

    @property
    def protected(self) -> str:
        """The unit in full: other patterns make other patients."""
        return self.unit if self.patient is None else f"{self.unit} {self.patient}"

    @field_validator("patient")
    @classmethod
    def _searches(cls, value: str | None) -> str | None:
        try:
            groups = re.compile(value or "").groups
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression ({error})") from None
        if groups > 1:
            raise ValueError(f"{value!r} has {groups} groups; the patient is one group, or the whole match")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Privacy:
        if self.epsilon is not None and self.noise_multiplier:
            raise ValueError("epsilon and noise_multiplier say the same thing; give one of them")
        if self.clip is None and self.noise_multiplier:
            raise ValueError("noise_multiplier needs clip, the norm that it is relative to")
        if self.clip is None and (self.epsilon is not None or self.unit != "client"):
            raise ValueError("epsilon and unit need clip, the norm that a unit's part may have")
        if self.unit == "patient" and not self.patient:
            raise ValueError(
                "unit = 'patient' needs patient, a regular expression that finds the patient in an image's "
                r"id, such as 'p\d{8}'"
            )
        if self.unit != "patient" and (self.patient is not None or self.most_texts != _MOST_TEXTS):
            raise ValueError("patient and most_texts are for unit = 'patient'")
        return self


class Ledger(Options):
    """Where this machine writes down what it has released of its silos under `federate.privacy`.

    It lies in `$XDG_DATA_HOME/fedcmp/ledger` or `~/.local/share/fedcmp/ledger` by default, where no build is
    cleaned away, and knows caches by their content. With `epsilon`, every silo here has that budget at
    `delta`, over all runs: what would exceed it is refused, as is whatever is not private.
    """

    path: Path | None = None
    epsilon: float | None = Field(None, gt=0)
    delta: float = Field(1e-5, gt=0, lt=1)

    @property
    def folder(self) -> Path:
        """Where it lies."""
        if self.path is not None:
            return self.path
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "fedcmp" / "ledger"
