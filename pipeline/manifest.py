"""What a stage made, and of what: written last, so where a manifest is, all that it speaks of is whole."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import read_json, write_json
from fedcmp.pipeline.models.device import device_type

MANIFEST = "manifest.json"
_PACKAGES = ("fedcmp", "torch", "transformers", "open_clip_torch", "zarr", "numpy", "webdataset")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What is finished in a folder; None where nothing is.

    Raises:
        UserError: The file is not JSON, or no object.
    """
    content = read_json(folder / MANIFEST)
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{folder / MANIFEST}: not a manifest of FedCMP; remove it and run again")
    return content


def withdraw_manifest(folder: Path) -> None:
    """What is in a folder is about to change: until `write_manifest` nothing there is finished."""
    (folder / MANIFEST).unlink(missing_ok=True)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Everything else in a folder is written: from now on it is finished."""
    write_json(folder / MANIFEST, content)


def provenance(device: str) -> dict[str, Any]:
    """What made an artefact: versions of Python and the libraries, platform and device."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_type(device),
        "packages": versions,
    }
