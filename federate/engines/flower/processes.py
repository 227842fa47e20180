"""Flower's own programs as child processes, quiet and offline, that never outlive their parent."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedcmp.pipeline.errors import UserError

_GUARD = Path(__file__).parent / "guard.py"
_COLOUR = re.compile(r"\x1b\[\d*m")
_NO_REASON = re.compile(
    r"^(INFO|Exit Code)|https?://|Connection attempt failed|could not establish a connection"
)
REFUSED = "refused another app than this version's own"  # what our SuperNode says
_LINES = 40
_UNREAD = 10_000
_GRACE = 10.0
# Flower's own pace of looking for work is a second; tasks here are few and long.
_POLL = "0.1"


def need_flower() -> None:
    """Say how to install Flower where it is missing.

    Raises:
        UserError: It is missing.
    """
    if importlib.util.find_spec("flwr") is None:
        raise UserError("--engine flower and 'fedcmp site' need Flower; run pip install 'fedcmp[flower]'")


def environment(home: Path) -> dict[str, str]:
    """Variables for Flower's programs: their folder, no network but ours, the programs beside this Python."""
    programs = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": _POLL,
        "PYTHONUNBUFFERED": "1",
    }


class Child:
    """A running program whose last lines are kept.

    Args:
        command: Program and arguments.
        variables: Its environment.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self.lines: deque[str] = deque(maxlen=_LINES)
        self._new: deque[str] = deque(maxlen=_UNREAD)
        self._process = subprocess.Popen(
            [sys.executable, str(_GUARD), *command],
            env=dict(variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            self._new.append(line.rstrip())

    def new_lines(self) -> list[str]:
        """What it said since this was asked last."""
        return [self._new.popleft() for _ in range(len(self._new))]

    def ended(self) -> bool:
        """Whether it is over."""
        return self._process.poll() is not None

    def succeeded(self) -> bool:
        """Whether it ended well."""
        return self._process.poll() == 0

    def said(self, words: str) -> bool:
        """Whether a line it still remembers has these words."""
        return any(words in line for line in list(self.lines))

    def complaint(self) -> str:
        """What it gave as the reason for its end, as far as that can be told."""
        self._reader.join(1)
        lines = [_COLOUR.sub("", line).strip() for line in list(self.lines)]
        kept = [line for line in lines if line and not _NO_REASON.search(line)]
        coded = [line for line in kept if "[code:" in line]
        return (coded or kept or ["no answer"])[-1]

    def stop(self) -> None:
        """End it and its children, by force if need be."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(_GRACE)
        assert self._process.stdout is not None
        self._process.stdout.close()


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(address: str) -> bool:
    """Whether a program of this machine accepts connections at host:port."""
    host, _, port = address.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host)
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def wait_for_port(address: str, child: Child, seconds: float) -> None:
    """Wait until a child listens.

    Raises:
        UserError: It ended, or does not listen in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not child.ended():
        if listens(address):
            return
        time.sleep(0.1)
    raise UserError(f"no SuperLink at {address}: {child.complaint()}")
