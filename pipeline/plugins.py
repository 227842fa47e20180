"""Plugins: components from outside this package, in a file that an experiment names or in a package.

A plugin's bytes decide results, so what identifies a result holds them: of a file its hash, of a package
its name, its version and the hash of the module that has the component.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from fedcmp.pipeline.errors import ComponentError, UserError, one_line
from fedcmp.pipeline.hashes import sha256_file

# Under this name a plugin's module holds what it registers: only its own experiment sees that.
OWN = "__fedcmp_registered__"

Registered = list[tuple[str, str, type[Any]]]  # kind, name, class


@dataclass(frozen=True)
class Plugin:
    """A plugin file as it was when its experiment was read; other processes run the same bytes.

    Attributes:
        path: Where it lies, absolute.
        source: Its bytes.
        unreadable: Why it has none, or empty.
    """

    path: Path
    source: bytes
    unreadable: str = ""

    @property
    def provenance(self) -> dict[str, str]:
        """What identities hold of a component from here; no option can have this name."""
        return {"plugin file": sha256(self.source).hexdigest()}


@dataclass(frozen=True)
class Loaded:
    """What a plugin registers, and what is wrong with it, or empty."""

    registered: Registered
    problem: str = ""


def read(path: Path) -> Plugin:
    """Read a plugin; one that cannot be read breaks only what asks for a component of it."""
    try:
        return Plugin(path, path.read_bytes())
    except OSError as error:
        return Plugin(path, b"", error.strerror or one_line(error))


@cache
def run(plugin: Plugin) -> Loaded:
    """Run a plugin, once a process; whatever goes wrong in it stays in it."""
    if plugin.unreadable:
        hint = "correct the path; it counts from the file that names it, else from the working directory"
        return Loaded([], f"cannot be read: {plugin.unreadable}; {hint}")
    module = ModuleType(f"fedcmp_plugin_{plugin.path.stem}_{plugin.provenance['plugin file'][:12]}")
    module.__file__ = str(plugin.path)
    registered: Registered = []
    vars(module)[OWN] = registered
    sys.modules[module.__name__] = module  # annotations are looked up there
    try:
        exec(compile(plugin.source, str(plugin.path), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:  # a plugin may raise anything
        del sys.modules[module.__name__]
        return Loaded([], f"cannot be loaded: {_place(error, plugin.path)}; mend it")
    if not registered:
        return Loaded([], 'registers nothing; write @STRATEGIES.register("NAME") or the like above a class')
    return Loaded(registered)


def _place(error: BaseException, path: Path) -> str:
    """The line of a plugin that an error came from, and the error."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = f"line {frames[-1].lineno}: " if frames else ""
    return f"{line}{type(error).__name__}: {one_line(error)}"


@contextmanager
def blamed(component: object, what: str) -> Iterator[None]:
    """Say in one line which component from outside has failed; our own fail as they do.

    Raises:
        ComponentError: Naming `what`, the component's file and the line.
    """
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        name = type(component).__module__
        if name.partition(".")[0] == "fedcmp" or "out of memory" in str(error):
            raise
        file = getattr(sys.modules.get(name), "__file__", None) or name
        raise ComponentError(f"{what}: {file}: {_place(error, Path(file))}; mend it") from error


@cache
def points(group: str) -> Sequence[EntryPoint]:
    """Entry points of installed packages, such as those of `fedcmp.strategies`, in order of their names."""
    return sorted(entry_points(group=group), key=lambda point: (point.name, point.value))


def package_of(point: EntryPoint) -> str:
    """Name and version of the package that has an entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.module


def provenance_of(cls: type[Any], group: str) -> dict[str, str]:
    """What identities hold of a component that is registered for all experiments; nothing of our own."""
    top = cls.__module__.partition(".")[0]
    if top == "fedcmp":
        return {}
    packages = [package_of(point) for point in points(group) if point.module.partition(".")[0] == top]
    found = {"plugin package": packages[0]} if packages else {}
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return found | ({"plugin file": _loaded_hash(file)} if file else {})


@cache
def _loaded_hash(file: str) -> str:
    """Hash of a module's file; asked once, as its code is loaded once."""
    return sha256_file(Path(file))
