"""`fedcmp federate --engine flower` and `fedcmp site`: Flower's processes started, watched and stopped."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedcmp.federate.engines.flower import daemon
from fedcmp.federate.engines.flower.keys import Keys, check_place, site_keys
from fedcmp.federate.engines.flower.processes import REFUSED, Child, environment, free_port
from fedcmp.federate.engines.flower.superlink import CONNECTION, superlink
from fedcmp.federate.engines.service import Service
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import locked

APP = Path(__file__).parent / "app"
_SUPERNODE = (sys.executable, "-m", "fedcmp.federate.engines.flower.supernode")
_DECORATION = re.compile(r"^(\x1b\[\d+m)?INFO|^Using SuperLink|^Successfully (started|installed)")
_CONTACT_SECONDS = 20.0
_REFUSED_SECONDS = 60.0
_BACKOFF = (1.0, 2.0, 5.0, 10.0)


def federate(
    experiment: Experiment, config: Path, overrides: Sequence[str], address: str, keys: Keys
) -> None:
    """Start a SuperLink, run the experiment over its sites, and stop it.

    Args:
        experiment: The experiment, read already.
        config: Its file.
        overrides: As given on the command line.
        address: Where sites reach this machine, as host:port.
        keys: How they are known.

    Raises:
        UserError: Whatever stops the run.
    """
    check_place("--address", address, keys.insecure)
    if not keys.insecure:
        _required("--certificate, --key and --site-keys", keys.certificate, keys.key, keys.sites)
    silos = site_keys(keys.sites, experiment.federate.silos) if keys.sites else None
    with tempfile.TemporaryDirectory(prefix="fedcmp-server-") as folder:
        home, outcome = Path(folder), Path(folder) / "outcome.txt"
        task = {"overrides": list(overrides), "outcome": str(outcome), "alive": str(home / "alive")}
        # Held while this process lives, however it ends.
        with locked(home / "alive", folder):
            _serve(config, address, keys, silos, home, task)
        # Written whatever the run's end, empty where all is well.
        if not outcome.is_file():
            raise UserError(f"{experiment.run_path}: the run ended early; run the same command to go on")
        if problem := outcome.read_text():
            raise UserError(problem)


def _serve(
    config: Path, address: str, keys: Keys, silos: dict[str, Path] | None, home: Path, task: dict[str, Any]
) -> None:
    """Run the task over a SuperLink of its own."""
    with superlink(address, keys, silos, home) as server:
        (home / "task.json").write_text(json.dumps(task | {"owners": server.owners}))
        say(f"server at {address}, sites may come")
        options = f'config="{config.resolve()}" task="{home / "task.json"}"'
        command = ["flwr", "run", str(APP), CONNECTION, "--stream", "--run-config", options]
        _follow(Child(command, server.variables), server.child)


def _required(options: str, *values: Path | None) -> None:
    if None in values:
        raise UserError(f"give {options}, or --insecure within one machine")


def _follow(run: Child, superlink: Child) -> None:
    """Pass on what the run says until it ends."""
    try:
        while not run.ended():
            _pass_on(run)
            if superlink.ended():
                raise UserError(
                    f"the SuperLink ended: {superlink.complaint()}; run the same command to go on"
                )
            time.sleep(0.1)
        _pass_on(run)
    finally:
        run.stop()


def _pass_on(run: Child) -> None:
    """Everything but what Flower says about itself."""
    for line in run.new_lines():
        if not _DECORATION.search(line):
            print(line, flush=True)


def site(service: Service, silo: str, superlink: str, keys: Keys, patience: float) -> None:
    """Hold a silo and the LLM ready for a server until interrupted.

    Args:
        service: The silo and the LLM.
        silo: Its name.
        superlink: The server, as host:port.
        keys: How they know each other.
        patience: Seconds without a server after which to give up.

    Raises:
        UserError: The server cannot be reached or does not accept the site's key.
    """
    check_place("--superlink", superlink, keys.insecure)
    command = [*_SUPERNODE, "--superlink", superlink, "--host", "127.0.0.1"]
    command += ["--max-wait-time", f"{min(_CONTACT_SECONDS, patience):g}"]
    if keys.insecure:
        command += ["--insecure"]
    else:
        _required("--ca and --key", keys.ca, keys.key)
        command += ["--root-certificates", str(keys.ca), "--auth-supernode-private-key", str(keys.key)]
    folder = Path(tempfile.mkdtemp(prefix="fedcmp-site-"))
    path = folder / "site.sock"
    command += ["--node-config", f'silo="{silo}" socket="{path}"']
    try:
        with daemon.listen(path) as server:
            say(f"site {silo}: connecting to {superlink}")
            watcher = _Watcher(command, environment(folder), silo, superlink, patience, server)
            signal.signal(signal.SIGTERM, lambda *_: watcher.shut())
            watcher.start()
            try:
                daemon.serve(server, service)
            finally:
                watcher.shut()
                watcher.join()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if watcher.problem is not None:
        raise UserError(watcher.problem)


class _Watcher(threading.Thread):
    """Keeps a SuperNode running: server restarts and lost connections end it."""

    def __init__(
        self,
        command: Sequence[str],
        variables: dict[str, str],
        silo: str,
        superlink: str,
        patience: float,
        server: socket.socket,
    ) -> None:
        super().__init__(daemon=True)
        self._command, self._variables = command, variables
        self._silo, self._superlink, self._patience, self._server = silo, superlink, patience, server
        self._stopped = threading.Event()
        self.problem: str | None = None

    def shut(self) -> None:
        """Stop the SuperNode and the daemon's waiting."""
        self._stopped.set()
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        """Start SuperNodes, one after the other."""
        contact, tries = time.monotonic(), 0
        while not self._stopped.is_set():
            child = Child([*self._command, "--port", str(free_port())], self._variables)
            connected = False
            while not child.ended() and not self._stopped.wait(0.2):
                if not connected and child.said("SuperNode ID"):
                    connected, tries = True, 0
                    say(f"site {self._silo}: connected to {self._superlink}")
                if connected:
                    contact = time.monotonic()
                for line in child.new_lines():
                    if line.startswith(REFUSED):
                        say(f"site {self._silo}: {line}; give the server this version of FedCMP and Flower")
            child.stop()
            if self._stopped.is_set():
                return
            why, alone = child.complaint(), time.monotonic() - contact
            # A server that has just started may not have registered this site's key yet.
            if child.said("[code:") and alone > min(self._patience, _REFUSED_SECONDS):
                self.problem = f"the server at {self._superlink} does not accept site '{self._silo}': {why}"
            elif alone > self._patience:
                self.problem = f"no server at {self._superlink} for {self._patience:g} s: {why}"
            if self.problem is not None:
                self.shut()
                return
            say(f"site {self._silo}: no connection to {self._superlink} ({why}), trying again")
            self._stopped.wait(_BACKOFF[min(tries, len(_BACKOFF) - 1)])
            tries += 1
