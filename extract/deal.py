"""How images are dealt out to silos: pure functions of names, labels and a generator."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.options import Name, Options

_DRAWS = 1000


class Partition(Options):
    """How to deal out images.

    The label of an image is one of: `field`, a key of its entry (dots go deeper); `component`, a part of
    its path (0 is the first folder, -1 the file); `pattern`, the first group of a regular expression
    searched in its path. `names` are the silos, or `silos` their number. Sizes of `quantity` are
    `shares`, or a Dirichlet draw with `alpha`, or fall as k^-`power`; equal without any.
    """

    by: Literal["field", "dirichlet", "quantity", "hash"]
    field: str | None = None
    component: int | None = None
    pattern: str | None = None
    silos: int | None = Field(None, ge=1)
    names: tuple[Name, ...] = ()
    alpha: float | None = Field(None, gt=0)
    shares: tuple[float, ...] = ()
    power: float | None = Field(None, ge=0)
    min_size: int = Field(1, ge=0)
    seed: int = Field(0, ge=0)


def by_hash(names: Sequence[str], silos: int) -> np.ndarray:
    """Silo of each name by its SHA-256: images that join later move no other."""
    digests = (hashlib.sha256(name.encode()).digest() for name in names)
    return np.array([int.from_bytes(digest[:8], "big") % silos for digest in digests], np.int64)


def by_quantity(number: int, shares: Sequence[float] | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Silo of each of `number` images in random order, in `shares` that are kept to within one image."""
    return rng.permutation(np.repeat(np.arange(len(shares)), portions(number, shares)))


def portions(number: int, shares: Sequence[float] | np.ndarray) -> np.ndarray:
    """Split a number into whole parts in proportion to shares, by largest remainder."""
    exact = np.asarray(shares, np.float64) / np.sum(shares) * number
    parts = np.floor(exact).astype(np.int64)
    left = number - int(parts.sum())
    parts[np.argsort(parts - exact, kind="stable")[:left]] += 1
    return parts


def dirichlet(labels: Sequence[str], silos: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Silo of each image, every label spread by its own draw from Dirichlet(alpha) (Hsu et al., 2019)."""
    silo = np.empty(len(labels), np.int64)
    members_of: dict[str, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        members_of[label].append(place)
    for _, members in sorted(members_of.items()):
        silo[members] = by_quantity(len(members), _draw_shares(silos, alpha, rng), rng)
    return silo


def by_field(labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Silo of each image, and the silos' names: the labels with other characters than a name may have as `_`.

    Raises:
        UserError: Two labels become one name.
    """
    names: dict[str, str] = {}
    for label in sorted(set(labels)):
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", label).lstrip("._-") or "unnamed"
        other = names.setdefault(name, label)
        if other != label:
            raise UserError(f"the labels '{other}' and '{label}' would both be silo '{name}'; rename one")
    places = {label: place for place, label in enumerate(names.values())}
    return np.array([places[label] for label in labels], np.int64), list(names)


def _draw_shares(silos: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    shares = rng.dirichlet(np.full(silos, alpha))
    # With a tiny alpha every coordinate can round to zero: the limit is all in one silo.
    return shares if np.isfinite(shares).all() and shares.sum() > 0 else np.eye(silos)[rng.integers(silos)]


def deal(options: Partition, names: Sequence[str], labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Silo of each image, and the silos' names.

    Args:
        options: How.
        names: Relative path of each image.
        labels: Label of each image; empty where no label is asked for.

    Raises:
        UserError: Options are missing or contradict each other, or a silo would be too small.
    """
    if options.by == "field":
        silo, silos = by_field(labels)
        _require_size(silo, silos, options.min_size)
        return silo, silos
    silos = _silo_names(options)
    for draw in range(_DRAWS):
        rng = np.random.default_rng([options.seed, draw])
        if options.by == "hash":
            silo = by_hash(names, len(silos))
        elif options.by == "quantity":
            silo = by_quantity(len(names), _shares(options, len(silos), rng), rng)
        else:
            if options.alpha is None:
                raise UserError("--by dirichlet: --alpha is missing; 0.1 is very skewed, 100 nearly uniform")
            silo = dirichlet(labels, len(silos), options.alpha, rng)
        if np.bincount(silo, minlength=len(silos)).min() >= options.min_size:
            return silo, silos
        if options.alpha is None:
            break
    _require_size(silo, silos, options.min_size)
    raise AssertionError("unreachable")


def _silo_names(options: Partition) -> list[str]:
    counts = {
        "--silos": options.silos,
        "--name": len(options.names) or None,
        "--shares": (len(options.shares) or None) if options.by == "quantity" else None,
    }
    given = {option: count for option, count in counts.items() if count is not None}
    if not given:
        raise UserError(f"--by {options.by}: how many silos? Pass --silos or --name")
    if len(set(given.values())) > 1:
        said = ", ".join(f"{option} {count}" for option, count in given.items())
        raise UserError(f"the number of silos is not one: {said}")
    if len(set(options.names)) < len(options.names):
        raise UserError(f"--name: {', '.join(options.names)}: a silo is named more than once")
    number = next(iter(given.values()))
    width = len(str(number - 1))
    return list(options.names) or [f"silo_{place:0{width}d}" for place in range(number)]


def _shares(options: Partition, silos: int, rng: np.random.Generator) -> Sequence[float] | np.ndarray:
    ways = {"--shares": options.shares or None, "--alpha": options.alpha, "--power": options.power}
    given = [way for way, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"--by quantity: {' and '.join(given)} both give the sizes; pass one")
    if options.shares:
        if not all(np.isfinite(options.shares)) or min(options.shares) < 0 or sum(options.shares) <= 0:
            raise UserError(f"--shares {options.shares}: expected shares from 0 with a positive sum")
        return options.shares
    if options.alpha is not None:
        return _draw_shares(silos, options.alpha, rng)
    return np.arange(1, silos + 1, dtype=np.float64) ** -(options.power or 0.0)


def _require_size(silo: np.ndarray, silos: Sequence[str], min_size: int) -> None:
    sizes = np.bincount(silo, minlength=len(silos))
    small = int(sizes.argmin())
    if sizes[small] < min_size:
        raise UserError(
            f"silo '{silos[small]}' would get {sizes[small]} images, fewer than --min-size {min_size}; "
            "take fewer silos, a larger --alpha, or a smaller --min-size"
        )
