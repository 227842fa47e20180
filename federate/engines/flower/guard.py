"""Runs a program so that neither it nor its children outlive whoever holds the other end of our stdin.

    python guard.py PROGRAM ARGUMENTS...

Flower's helpers watch their parents, but not while they wait for a server that is gone.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

_GRACE = 5.0


def main() -> int:
    """Run the program; its whole process group ends with it, or when stdin closes."""
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def wait_for_holder() -> None:
        while os.read(0, 1024):
            pass
        _signal(process.pid, signal.SIGTERM)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            _signal(process.pid, signal.SIGKILL)

    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=wait_for_holder, daemon=True).start()
    code = process.wait()
    _signal(process.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main())
