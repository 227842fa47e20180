"""Work in a process of its own, for C libraries that a damaged file can crash or keep busy for ever."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any, TypeVar

from fedcmp.pipeline.errors import UserError

T = TypeVar("T")

# Of computing, which waiting for a slow disk or a busy machine is not.
SECONDS = 60.0
# The same modules as here, whatever lies in the working directory.
_CHILD = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from fedcmp.pipeline.apart import serve
serve()
"""


def apart(path: object, function: Callable[..., Iterable[T]], *arguments: Any) -> Iterator[T]:
    """Yield what a function yields that runs in another process.

    Args:
        path: The file that it reads, for messages; what reads several may say which it is by then.
        function: One that can be imported.
        *arguments: What it takes; these, what it yields and what it raises have to be picklable.

    Raises:
        UserError: The process has crashed, or computed for more than a minute without yielding anything.
        Exception: Whatever the function raises.
    """
    with TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError), process.stdin as requests:
                pickle.dump(sys.path, requests)
                pickle.dump((SECONDS, function, arguments), requests)
            while True:
                try:
                    kind, item = pickle.load(process.stdout)
                except (EOFError, pickle.UnpicklingError):
                    # One that is alive after all finds nobody to write to.
                    process.stdout.close()
                    code = process.wait()
                    errors.seek(0)
                    raise _ended(path, code, errors.read().decode(errors="replace")) from None
                if kind == "end":
                    return
                if kind == "raised":
                    raise item
                yield item
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _ended(path: object, code: int, said: str) -> Exception:
    if code == -signal.SIGKILL:
        return UserError(f"{path}: the process that reads it was killed; see that memory does not run out")
    if code < 0:
        endless = f"comes to no end (stopped after {SECONDS:g} s of computing)"
        what = endless if code == -signal.SIGPROF else f"crashes ({signal.strsignal(-code)})"
        return UserError(f"{path}: damaged, as reading it {what}; have it sent again, or make it anew")
    return RuntimeError(f"{path}: the process that reads it ended with exit code {code}: {said[-2000:]}")


def serve() -> None:
    """Answer the one request on standard input."""
    # What is printed must not come between what is yielded.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    seconds, function, arguments = pickle.load(sys.stdin.buffer)
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        for item in function(*arguments):
            _send(out, "item", item)
            signal.setitimer(signal.ITIMER_PROF, seconds)
        _send(out, "end", None)
    except BrokenPipeError:
        return
    except Exception as error:
        _send(out, "raised", error)


def _send(out: Any, kind: str, item: Any) -> None:
    pickle.dump((kind, item), out, protocol=pickle.HIGHEST_PROTOCOL)
    out.flush()
