"""Flower's SuperNode, made to accept one app and no other, and to end when it has given up.

    python -m fedcmp.federate.engines.flower.supernode ARGUMENTS...

A SuperNode runs the app that its server sends. Flower's own pins (`--trusted-entities`) are signatures of
its hub, which apps submitted from a folder do not have. Where Flower no longer has what is replaced here,
this does not start.
"""

import hashlib
import importlib
import io
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

from flwr.cli.build import build_fab_from_disk

from fedcmp.federate.engines.flower.processes import REFUSED

connection = importlib.import_module("flwr.supernode.fleet_http_connection")
loop = importlib.import_module("flwr.supernode.start_client_internal")
program = importlib.import_module("flwr.supernode.cli.flower_supernode")
_MOST_FILES, _MOST_BYTES = 16, 2**20


def content(fab: bytes) -> str:
    """SHA-256 of the names and bytes of an app's files; compression may differ between machines.

    Raises:
        ValueError: It is no app, or far larger than ours.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(fab)) as archive:
            files = archive.infolist()
            if len(files) > _MOST_FILES or sum(file.file_size for file in files) > _MOST_BYTES:
                raise ValueError("too large")
            parts = sorted((file.filename, archive.read(file)) for file in files)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"no app ({error})") from None
    whole = hashlib.sha256()
    for name, data in parts:
        whole.update(f"{len(name.encode())} {name} {len(data)} ".encode() + data)
    return whole.hexdigest()


def _pin(accepted: str) -> None:
    """Have every app compared with ours before it is stored or run."""

    def verified(fab: Any, entities: Any) -> bool:
        try:
            found = content(fab.content)
        except Exception as error:
            found = str(error)
        if found != accepted:
            print(f"{REFUSED}: {found}, accepted {accepted}", flush=True)
        return found == accepted

    received, start = connection.fab_from_proto, loop.start_client_internal

    def to_be_verified(message: Any) -> Any:
        fab = received(message)
        fab.verifications["valid_license"] = "by content"  # Flower compares nothing without it
        return fab

    def pinned(**options: Any) -> None:
        start(**options | {"trusted_entities": {"content": accepted}})

    _replace(loop, "_verify_fab", verified)
    _replace(connection, "fab_from_proto", to_be_verified)
    _replace(program, "start_client_internal", pinned)


def _replace(module: Any, name: str, function: Any) -> None:
    getattr(module, name)
    setattr(module, name, function)


if __name__ == "__main__":
    _pin(content(build_fab_from_disk(Path(__file__).parent / "app")))
    sys.argv[0] = "flower-supernode"
    try:
        program.flower_supernode()
    finally:
        # Its other threads would keep the process alive for ever, connected to nothing.
        sys.stdout.flush()
        os._exit(1)
