"""What a finished run left in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcmp.pipeline import history
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.manifest import read_manifest

if TYPE_CHECKING:
    from torch import Tensor

    from fedcmp.pipeline.cache import FeatureCache
    from fedcmp.pipeline.models.projectors.base import Projector
    from fedcmp.pipeline.plugins import Plugin

PROJECTOR = "projector.safetensors"
SAMPLED = "sampled.jsonl"
LOCAL = "local"
RESIDUALS = "residuals"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: Its folder.
        manifest: What it was made of and what it ended with.
        plugins: Where its projector's architecture may be from.
    """

    path: Path
    manifest: dict[str, Any]
    plugins: tuple[Plugin, ...] = ()

    @classmethod
    def find(cls, path: Path, plugins: tuple[Plugin, ...] = ()) -> Run | None:
        """The finished run in a folder; None where there is none.

        Raises:
            UserError: Its manifest is not JSON.
        """
        manifest = read_manifest(path)
        return None if manifest is None or "projectors" not in manifest else cls(path, manifest, plugins)

    @property
    def identity(self) -> dict[str, Any]:
        """All that decided its result; empty for a run of before there were such."""
        identity: dict[str, Any] = self.manifest.get("identity", {})
        return identity

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """A row for every client and round, and one for the round itself, whose `client` is None."""
        return read_history(self.path)

    @property
    def sampled(self) -> list[dict[str, Any]]:
        """Answers before and after an alignment; none of other runs."""
        return history.read(self.path / SAMPLED)

    @property
    def projectors(self) -> dict[str, str]:
        """Content hashes of its projectors, by their files' names within the run."""
        contents: dict[str, str] = self.manifest["projectors"]
        return contents

    @property
    def judged(self) -> list[str]:
        """The projectors that it is judged by: its silos' own where it has such, else the global one."""
        names = list(self.projectors)
        return [name for name in names if name.startswith("silos/")] or names

    def projector(self, name: str = PROJECTOR) -> Projector:
        """One of its projectors by its name: `projector(features)` gives visual tokens.

        Raises:
            UserError: The file is missing, damaged, or holds other weights than the run ended with.
        """
        from fedcmp.pipeline.models.projector import content_hash, load_projector

        projector, state = load_projector(self.path / name, self.plugins)
        if content_hash(state) != self.projectors[name]:
            raise UserError(
                f"{self.path / name}: the run was trained again meanwhile; run the same command again"
            )
        return projector

    @property
    def adapters(self) -> dict[str, str]:
        """Content hashes of the LLM's adapters, by the names of their projectors' files; mostly none."""
        contents: dict[str, str] = self.manifest.get("adapters", {})
        return contents

    def adapter(self, name: str = PROJECTOR) -> dict[str, Tensor]:
        """The adapter that belongs to a projector: its matrices by name, none where the LLM is frozen.

        Raises:
            UserError: The file is missing, damaged, or holds other weights than the run ended with.
        """
        from fedcmp.pipeline.models.lora import load_adapter
        from fedcmp.pipeline.models.projector import content_hash

        if name not in self.adapters:
            return {}
        folder = adapter_folder(self.path, name)
        adapter = load_adapter(folder)
        if content_hash(adapter) != self.adapters[name]:
            raise UserError(
                f"{folder}: not the adapter that the run ended with; put that back, or train the run again"
            )
        return adapter

    def own_part(self, name: str) -> str | None:
        """Content hash of what the client of a projector keeps to itself; mostly there is no such thing.

        Raises:
            UserError: It is not here.
        """
        from safetensors.torch import load_file

        from fedcmp.pipeline.models.projector import content_hash

        kept = self.manifest.get("local", {}).get(Path(name).stem)
        if kept is None or name == PROJECTOR:
            return None
        path = local_part(self.path, Path(name).stem, kept["round"])
        if kept["content"] is None and not path.is_file():
            raise UserError(f"{path}: missing; it is where the client trained: copy it here")
        content: str = kept["content"] or content_hash(load_file(path))
        return content

    def require_encoding(self, cache: FeatureCache) -> None:
        """It sees only features such as those it was trained on.

        Raises:
            UserError: The cache's are others.
        """
        if cache.cache_key != self.manifest["cache_key"]:
            raise UserError(
                f"{cache.path}: encoded differently from the silos of {self.path}; extract it with the "
                "run's configuration"
            )


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows that a run has written so far, be it finished or not."""
    return history.read(path / history.HISTORY)


def projector_file(path: Path) -> Path:
    """The projector of a run's folder, or the file itself."""
    return path / PROJECTOR if path.is_dir() else path


def own_projector(silo: str) -> str:
    """The name of a silo's own projector within a run."""
    return f"silos/{silo}.safetensors"


def local_part(run: Path, client: str, round_: int) -> Path:
    """Where a client keeps what it kept to itself after a round."""
    return run / LOCAL / client / f"{round_}.safetensors"


def adapter_folder(run: Path, name: str) -> Path:
    """Where the adapter of one of a run's projectors is, in PEFT's layout."""
    return run / "adapter" if name == PROJECTOR else (run / name).with_suffix("")


def place_of(file: Path) -> tuple[Path, str]:
    """The folder of the run that a projector would be of, and its name there."""
    folder = file.parent.parent if file.parent.name == "silos" else file.parent
    return folder, file.relative_to(folder).as_posix()
