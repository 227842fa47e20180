"""Reading an experiment file.

One file is one run. `extends = "../demo.toml"` takes everything from another file and overrides
parts of it; a table that changes its component's `name` replaces the other's options as a whole.
`plugins` of a file come on top of those of the other, as neither can replace what another registers.
`{seed}` and `{experiment}` in any text stand for the file's own, so that seeds may have their own data.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.options import validate


def load(path: Path, overrides: Sequence[str] = (), *, changes: Iterable[dict[str, Any]] = ()) -> Experiment:
    """Read an experiment file; `run` defaults to the file's own name.

    Args:
        path: TOML file.
        overrides: `key.sub=value` strings, applied last; values are TOML, or else plain text.
        changes: Tables to put over those of the file.

    Raises:
        UserError: The file is missing or malformed, or a key or value is wrong.
    """
    tables = _read(path, ())
    tables.setdefault("run", path.stem)
    return experiment_of(tables, [*changes, *map(_parse_override, overrides)], str(path))


def experiment_of(
    tables: dict[str, Any], changes: Iterable[dict[str, Any]] = (), source: str = ""
) -> Experiment:
    """The experiment of some tables.

    Args:
        tables: As they stand in a file.
        changes: Tables to put over them, one after the other.
        source: Where they are from, for messages.

    Raises:
        UserError: A key or value is wrong.
    """
    for change in changes:
        tables = _over(tables, located(change, Path()))
    for place in ("seed", "experiment"):
        tables = _fill(tables, f"{{{place}}}", str(tables.get(place, 0)))
    return validate(Experiment, tables, "", source)


def _fill(value: Any, placeholder: str, content: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill(each, placeholder, content) for key, each in value.items()}
    if isinstance(value, list):
        return [_fill(each, placeholder, content) for each in value]
    return value.replace(placeholder, content) if isinstance(value, str) else value


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of one file as they stand there.

    Raises:
        UserError: The file is missing or malformed.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give the path of an experiment's or ablation's TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def files(path: Path) -> list[Path]:
    """A loadable file after all that it extends, in the order in which they apply."""
    base = read_toml(path).get("extends")
    return [path] if base is None else [*files(Path(os.path.normpath(path.parent / base))), path]


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: 'extends' forms a circle; remove it from one of the files")
    tables = located(read_toml(path), path.parent)
    base = tables.pop("extends", None)
    if base is None:
        return tables
    if not isinstance(base, str):
        raise UserError(f"{path}: extends = {base!r}: expected the path of another file")
    return _over(_read(path.parent / base, (*seen, path.resolve())), tables)


def located(tables: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tables with absolute paths of plugins, which are found from the folder of their file."""
    named = tables.get("plugins")
    if not isinstance(named, list):
        return tables
    paths = [os.path.abspath(folder / each) if isinstance(each, str) else each for each in named]
    return tables | {"plugins": paths}


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """One file's tables over another's, or an override; plugins are those of both."""
    merged, lists = _merge(below, above), [tables.get("plugins", []) for tables in (below, above)]
    if merged.get("plugins") and all(isinstance(each, list) for each in lists):
        merged["plugins"] = [*lists[0], *(each for each in lists[1] if each not in lists[0])]
    return merged


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    renamed = "name" in above and above["name"] != below.get("name", above["name"])
    merged = {} if renamed else dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise UserError(f"--set {override}: expected key.sub=value, e.g. federate.rounds=5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return nested(key, value)


def nested(key: str, value: Any) -> dict[str, Any]:
    """Tables that hold one value: `a.b` and 1 are `{"a": {"b": 1}}`."""
    for part in reversed(key.split(".")):
        value = {part.strip(): value}
    return dict(value)
