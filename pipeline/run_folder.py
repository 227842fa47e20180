"""What a finished run left in its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def judged(manifest: dict[str, Any]) -> list[str]:
    """The projectors a run is judged by: its silos' own where it has such, else the global one."""
    names = list(manifest["projectors"])
    return [name for name in names if name.startswith("silos/")] or names
