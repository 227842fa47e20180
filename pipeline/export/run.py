"""Check that the parts belong together and write the directory; its manifest is last."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fedcmp.pipeline.cache import differences
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.export.subject import Subject, read_subject, refuse_inexpressible
from fedcmp.pipeline.files import locked, read_json, sync_directory
from fedcmp.pipeline.hashes import fingerprint, sha256_file
from fedcmp.pipeline.manifest import provenance, read_manifest, write_manifest
from fedcmp.pipeline.models.projector import content_hash
from fedcmp.pipeline.models.saved_model import LANGUAGE_FILES, model_hashes

FORMAT = {"name": "fedcmp-export", "version": 1}


def export(
    run: Path,
    form: str,
    out: Path,
    *,
    experiment: Experiment | None = None,
    encoder: str | None = None,
    language: Path | None = None,
) -> None:
    """Write a projector as others read it, or find it written.

    Args:
        run: A run's directory, or a projector.
        form: `hf` or `llava`.
        out: Directory to write; it must be empty or not exist.
        experiment: Says what is not given: the encoder, the LLM, the caches.
        encoder: Directory of the vision encoder, for `llava` also its name on the hub.
        language: Directory of the LLM.

    Raises:
        UserError: Something is missing, does not belong together, or has no such form.
    """
    from fedcmp.pipeline.export import hf, llava

    subject = read_subject(run, experiment)
    refuse_inexpressible(subject)
    tower = encoder or _configured_encoder(experiment)
    if tower is None:
        raise UserError("--encoder is missing; give the vision encoder's directory, or --config")
    folder = _checked_encoder(subject, Path(tower), needed=form == "hf")
    llm = language or (experiment.language.path if experiment else None)
    if form == "hf" and llm is None:
        raise UserError("--language is missing; give the LLM's directory, or --config")
    files = _checked_language(subject, llm)
    template = experiment.language.question_template if experiment else None
    identity = {
        "to": form,
        "projector": {"content": content_hash(subject.state), "architecture": subject.projector.architecture},
        **({"adapter": content_hash(subject.adapter[1])} if subject.adapter else {}),
        "features": {"key": subject.key, "patches": subject.patches},
        "encoder": None if folder else tower,
        "language": files,
        "question_template": template,
    }
    with locked(out.with_name(f".{out.name}.lock"), str(out)):
        if _is_there(out, identity):
            say(f"{out}: nothing to do, it is what would be written")
            return
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            if form == "llava":
                llava.write(partial, subject, folder, tower, llm)
            elif folder is not None and llm is not None:
                hf.write(partial, subject, folder, llm, template)
            _finish(partial, out, subject, identity)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    say(f"{subject.projector.architecture} of {subject.path} in {out}")


def _finish(partial: Path, out: Path, subject: Subject, identity: dict[str, Any]) -> None:
    files = {
        str(path.relative_to(partial)): [path.stat().st_size, sha256_file(path)]
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    write_manifest(
        partial,
        {
            "format": FORMAT,
            "projector": str(subject.path),
            "identity": identity,
            "fingerprint": fingerprint(identity),
            "files": files,
            "made_by": provenance("cpu"),
        },
    )
    if out.is_dir():
        out.rmdir()
    partial.rename(out)
    sync_directory(out.parent)


def _is_there(out: Path, identity: dict[str, Any]) -> bool:
    """Whether this very export lies in `out`.

    Raises:
        UserError: Something else does.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a directory")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    found = read_manifest(out) or {}
    if found.get("fingerprint") == fingerprint(identity):
        return True
    raise UserError(f"--out {out}: holds something else; give another directory, or remove it")


def _configured_encoder(experiment: Experiment | None) -> str | None:
    options = (experiment.extract.encoder.model_extra or {}) if experiment else {}
    path = options.get("path")
    return None if path is None else str(path)


def _checked_encoder(subject: Subject, path: Path, *, needed: bool) -> Path | None:
    """The encoder's directory, the one that made the features; None for a name on the hub."""
    if not needed and not path.exists():
        say(f"{path}: taken for a name on the hub, so it is not checked to be the encoder of the features")
        return None
    made: dict[str, str] = subject.key["encoder"]["files"]
    changed = differences(made, model_hashes(path, sorted(made)))
    if changed:
        raise UserError(f"--encoder {path}: not what the features were made with ({changed[0]})")
    return path


def _checked_language(subject: Subject, path: Path | None) -> dict[str, str] | None:
    """SHA-256 of the LLM's files, those that the projector was trained with."""
    if path is None:
        return None
    files = model_hashes(path, LANGUAGE_FILES)
    changed = [] if subject.language is None else differences(subject.language, files)
    if changed:
        raise UserError(f"--language {path}: not what {subject.path} was trained with ({changed[0]})")
    width = (read_json(path / "config.json") or {}).get("hidden_size")
    if width != subject.projector.d_llm:
        raise UserError(
            f"--language {path}: hidden_size is {width}, but {subject.path} maps to "
            f"{subject.projector.d_llm}; give the LLM that it was trained with"
        )
    return files
