"""A SuperLink on the loopback behind a gate, with the study's site keys registered."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedcmp.federate.engines.flower.gate import Gate
from fedcmp.federate.engines.flower.keys import Keys, inner_authority, public_key
from fedcmp.federate.engines.flower.processes import Child, environment, free_port, wait_for_port
from fedcmp.pipeline.errors import UserError

CONNECTION = "run"
_NODE = re.compile(r"SuperNode (\d+) registered")
_START_SECONDS = 120.0


@dataclass(frozen=True)
class SuperLink:
    """One that runs.

    Attributes:
        child: Its process.
        variables: Environment of Flower's commands, which reach it as `CONNECTION`.
        owners: The silo of every node's key; None where sites have no keys.
    """

    child: Child
    variables: dict[str, str]
    owners: dict[str, str] | None


@contextmanager
def superlink(address: str, keys: Keys, silos: Mapping[str, Path] | None, home: Path) -> Iterator[SuperLink]:
    """Start a SuperLink, and let sites come when it knows their keys.

    Args:
        address: Where sites reach this machine, as host:port.
        keys: The server's certificate, or none.
        silos: Every site's public key file; None where sites have no keys.
        home: A folder for Flower's files.

    Raises:
        UserError: The address is taken, or Flower does not start.
    """
    port, variables = free_port(), environment(home)
    command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--disable-runtime-dependency-installation"]
    connection = f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\n'
    authority = None
    if silos is None:
        command += ["--insecure"]
        connection += "insecure = true\n"
    else:
        authority, private = inner_authority(home)
        command += ["--ssl-ca-certfile", str(authority), "--ssl-certfile", str(authority)]
        command += ["--ssl-keyfile", str(private), "--enable-supernode-auth"]
        connection += f'root-certificates = "{authority}"\n'
    (home / "config.toml").write_text(connection)
    certificate = None
    if not keys.insecure:
        certificate = Path(str(keys.certificate)), Path(str(keys.key))
    known = None if silos is None else {public_key(file): silo for silo, file in silos.items()}
    gate = Gate(address, port, certificate, known, authority)
    child = Child(command, variables)
    try:
        wait_for_port(f"127.0.0.1:{port}", child, _START_SECONDS)
        owners = None
        if silos is not None:
            owners = {_registered(file, variables): silo for silo, file in silos.items()}
        with gate:
            yield SuperLink(child, variables, owners)
    finally:
        child.stop()
        gate.close()


def _registered(file: Path, variables: dict[str, str]) -> str:
    """The node that a site's key stands for, once the SuperLink knows it."""
    command = ["flwr", "supernode", "register", str(file), CONNECTION]
    child = Child(command, variables)
    deadline = time.monotonic() + _START_SECONDS
    while not child.ended() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.stop()
    found = _NODE.search("\n".join(child.lines))
    if not child.succeeded() or found is None:
        raise UserError(f"{' '.join(command)}: {child.complaint()}")
    return found[1]
