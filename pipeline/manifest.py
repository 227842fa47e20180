"""Provenance, checksums and atomic writes. A manifest is written last: its presence means whole."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from fedcmp.pipeline.models.device import device_type

_PACKAGES = ("fedcmp", "torch", "transformers", "open_clip_torch", "zarr", "numpy", "webdataset")


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
