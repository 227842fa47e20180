"""The projector to export, and what it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcmp.pipeline.cache import FeatureCache, open_cache
from fedcmp.pipeline.config import Experiment, Lora
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.projector import State, load_projector
from fedcmp.pipeline.models.projectors.base import Projector
from fedcmp.pipeline.run_folder import Run, place_of, projector_file

_EXPRESSIBLE = frozenset({"name", "files", "layer", "tokens", "pool", "pooling", "resize"})
# A model gets pictures that somebody else has opened.
_OF_FILES = frozenset({"orientation", "transparency"})


@dataclass(frozen=True)
class Subject:
    """A projector and what it was trained on.

    Attributes:
        path: Its file.
        projector: Its architecture and widths.
        state: Its weights.
        patches: Patches a picture.
        key: What decided its features, as in the manifest of the cache.
        language: SHA-256 of the LLM's files, where its run is known.
        adapter: How the LLM was tuned, if it was: options and matrices.
    """

    path: Path
    projector: Projector
    state: State
    patches: int
    key: dict[str, Any]
    language: dict[str, str] | None
    adapter: tuple[Lora, State] | None = None

    @property
    def layer(self) -> int:
        """Hidden state of the encoder that was projected, counted from the end."""
        return int(self.key["encoder"]["layer"])

    @property
    def tokens(self) -> str:
        """`patch` or `cls_patch`."""
        return str(self.key["encoder"]["tokens"])

    @property
    def resize(self) -> str:
        """How pictures became square: `crop`, `pad` or `squash`."""
        return str(self.key["encoder"].get("resize", "crop"))


def read_subject(path: Path, experiment: Experiment | None) -> Subject:
    """A run's projector or a projector's file, and the manifest that speaks of it.

    Raises:
        UserError: There is none, or nothing says which features it projects.
    """
    plugins = experiment.federate.projector.plugins if experiment else ()
    file = projector_file(path)
    projector, state = load_projector(file, plugins)
    folder, name = place_of(file)
    run = Run.find(folder, plugins)
    if run and name not in run.projectors:
        run = None
    if path.is_dir() and run is None:
        raise UserError(f"{path}: no finished run here; run 'fedcmp federate' first")
    known = run.manifest.get("features") if run else None
    features = known or _features(file, projector, run, experiment)
    language = run.identity["language"]["files"] if run else None
    adapter = None
    if run and name in run.adapters:
        adapter = Lora(**run.identity["federate"]["adapter"]), run.adapter(name)
    return Subject(file, projector, state, features["patches"], features["key"], language, adapter)


def _features(
    file: Path, projector: Projector, run: Run | None, experiment: Experiment | None
) -> dict[str, Any]:
    """What the projector's features are, from the cache of the experiment's first silo."""
    if experiment is None:
        raise UserError(
            f"{file}: no manifest beside it says which features it projects; give the experiment file "
            "with --config"
        )
    cache: FeatureCache = open_cache(experiment, experiment.federate.silos[0])
    if run and run.manifest["cache_key"] != cache.cache_key:
        raise UserError(
            f"{cache.path}: encoded differently from the silos of {file.parent}; give its own --config"
        )
    if cache.d_vision != projector.d_vision:
        raise UserError(
            f"{cache.path}: features of width {cache.d_vision}, but {file} takes {projector.d_vision}; give "
            "its own --config"
        )
    return {"patches": cache.patches, "key": cache.manifest["key"]}


def refuse_inexpressible(subject: Subject) -> None:
    """Others compute features from pixels again, so they must be able to compute the same.

    Raises:
        UserError: They cannot.
    """
    made = subject.key["encoder"]
    if made["name"] != "transformers" or not {"layer", "tokens"} <= made.keys():
        raise UserError(
            f"{subject.path}: its features are of an encoder '{made['name']}'; only towers of transformers "
            "can be exported"
        )
    if made.get("pool", 1) != 1:
        raise UserError(
            f"{subject.path}: its features were pooled (extract.encoder.pool = {made['pool']}), which "
            "LLaVA has no form for; train on features with pool = 1"
        )
    unknown = sorted(made.keys() - _EXPRESSIBLE - _OF_FILES)
    if unknown:
        raise UserError(
            f"{subject.path}: extract.encoder.{unknown[0]} = {made[unknown[0]]!r} has no form in LLaVA; "
            "train on features without it"
        )
