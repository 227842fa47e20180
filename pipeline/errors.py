"""The one error users see: a sentence naming the value, the place and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend; the command line prints it without traceback, exit code 2."""


def one_line(error: BaseException) -> str:
    """The beginning of an error's message on one line, or its type where it has none."""
    message = " ".join(str(error).split())
    return message[:200] or type(error).__name__


class DivergedError(UserError):
    """Training left the finite numbers: the fault of options, not of files or machines."""


class BusyError(UserError):
    """Another process is at work on the same thing."""


class DroppedOutError(UserError):
    """Too few clients stayed for a secure sum: run again when they are back."""


class SpoiledError(UserError):
    """A secure sum is not what its clients added, and who spoiled it cannot be seen."""


class ComponentError(UserError):
    """A component from outside this package failed, or gave what it may not."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for a close match, else the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(names) or 'none'}"
