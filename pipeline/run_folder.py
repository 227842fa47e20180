"""What a finished run left in its folder."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcmp.pipeline import history
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import read_json

if TYPE_CHECKING:
    from fedcmp.pipeline.models.projectors.base import Projector


class Run:
    """A finished run.

    Attributes:
        path: Its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the run was made of, and the hashes of its projectors.

        Raises:
            UserError: It is not finished.
        """
        manifest: dict[str, Any] | None = read_json(self.path / "manifest.json")
        if manifest is None:
            raise UserError(f"{self.path}: no finished run here; run 'fedcmp federate' first")
        return manifest

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """A row for every client of every round, and one for the round as a whole (`client` is None)."""
        return history.read(self.path / "history.jsonl")

    def projector(self, name: str = "projector.safetensors") -> Projector:
        """A projector, checked against the manifest: `projector(features)` gives visual tokens.

        Raises:
            UserError: It is missing or damaged, or not the one that the run ended with.
        """
        from fedcmp.pipeline.models.projector import load_projector

        return load_projector(self.path / name)[0]


def judged(manifest: dict[str, Any]) -> list[str]:
    """The projectors a run is judged by: its silos' own where it has such, else the global one."""
    names = list(manifest["projectors"])
    return [name for name in names if name.startswith("silos/")] or names
