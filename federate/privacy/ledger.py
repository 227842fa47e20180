"""What has been released of a silo, on its own machine: a file a cache, which outlives runs and processes.

A release is written down before the training that it comes from, so that one which was killed counts too.
"""

from __future__ import annotations

import hmac
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from fedcmp.federate.privacy.accounting import composed, spent
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import locked, read_json, write_atomic, write_json
from fedcmp.pipeline.options import Options
from fedcmp.pipeline.privacy import Ledger as Budget

_FORMAT = {"name": "fedcmp-ledger", "version": 1}
_KEY_BYTES = 32


@dataclass(frozen=True)
class Release:
    """One round's answer of one client, or the part of it that is of one pass.

    Attributes:
        run: Fingerprint of the run it was for.
        round: Round of the run.
        unit: What it protects.
        partition: Fingerprint of how a pass divides the units into turns; each unit is in one turn.
        turn: Whose units the round has used; 0 where it has used all.
        noise: Noise multiplier.
    """

    run: str
    round: int
    unit: str
    partition: str
    turn: int
    noise: float


class _Row(Options):
    """A release as it lies in the file."""

    run: str
    round: int = Field(ge=0)
    unit: str
    partition: str
    turn: int = Field(ge=0)
    noise: float = Field(ge=0)


class Ledger:
    """The releases of the silos of this machine.

    Args:
        options: Where it lies, and what may be released.
    """

    def __init__(self, options: Budget) -> None:
        self._options = options

    def path(self, content: str) -> Path:
        """The file of a cache, by the hash of its content."""
        return self._options.folder / f"{content}.json"

    def enter(self, silos: dict[str, str], *releases: Release) -> int:
        """Write an answer down, before it is sent.

        Args:
            silos: Names of the silos that it is of, with the hashes of their caches.
            *releases: What is about to be released, of one round: at least one, of different passes.

        Returns:
            How often this round of this run has been answered, this time included.

        Raises:
            UserError: It would exceed the budget, or the file cannot be read or written.
        """
        with ExitStack() as stack, self._writing():
            for content in sorted(set(silos.values())):
                stack.enter_context(self._locked(content))
            rows = {silo: [*self.releases(content), *releases] for silo, content in silos.items()}
            for silo, content in silos.items():
                self._check(silo, content, rows[silo])
            for silo, content in silos.items():
                own = [asdict(each) for each in rows[silo]]
                write_json(self.path(content), {"format": _FORMAT, "silo": silo, "releases": own})
        first = releases[0]
        same = (first.run, first.round, first.partition)
        return max(
            sum((each.run, each.round, each.partition) == same for each in own) for own in rows.values()
        )

    def pseudonym(self, content: str) -> str:
        """What others may know a cache by: its hash under a key that stays here.

        Who knows all of a silo but one text could tell from the hash itself whether a guess of it is right.

        Raises:
            UserError: The key cannot be read or written.
        """
        path = self._options.folder / "key"
        with self._writing(), self._locked("key"):
            if not path.exists():
                write_atomic(path, os.urandom(_KEY_BYTES))
                path.chmod(0o600)
            return hmac.digest(path.read_bytes(), content.encode(), "sha256").hex()

    def _locked(self, name: str) -> AbstractContextManager[None]:
        lock = self._options.folder / f".{name}.lock"
        return locked(lock, str(lock), wait=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"ledger.path = {self._options.folder}: cannot be written ({error.strerror}), so nothing is "
                "released; give a folder that can"
            ) from None

    def releases(self, content: str) -> list[Release]:
        """All that has been released of a cache.

        Raises:
            UserError: The file is damaged.
        """
        path = self.path(content)
        try:
            saved = read_json(path)
            if saved is None:
                return []
            if saved["format"] != _FORMAT:
                raise ValueError
            return [
                Release(**_Row.model_validate(row, strict=True).model_dump()) for row in saved["releases"]
            ]
        except (UserError, ValidationError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: not a ledger, so what this silo has released is unknown; restore it from a backup"
            ) from None

    def _check(self, silo: str, content: str, releases: Sequence[Release]) -> None:
        budget = self._options.epsilon
        if budget is None:
            return
        units = sorted({each.unit for each in releases})
        if len(units) > 1:
            raise UserError(
                f"silo '{silo}': there are releases by {' and by '.join(units)} in {self.path(content)}, "
                "which do not add up; a budget is for runs of one federate.privacy.unit"
            )
        epsilon = spent([total(releases)], self._options.delta)
        if epsilon > budget:
            raise UserError(
                f"silo '{silo}': with this round its releases would add up to epsilon = {epsilon:.2f} at "
                f"delta = {self._options.delta:g}, more than ledger.epsilon = {budget:g}; nothing is sent"
            )


def total(releases: Iterable[Release]) -> float:
    """Noise multiplier of the one release that releases are worth to the unit that is worst off.

    Turns of one partition have no unit in common, so the worst turn is what counts; different partitions may
    have put one unit into the worst turn of each.
    """
    turns: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for each in releases:
        turns[each.partition][each.turn].append(each.noise)
    return composed(min(map(composed, of.values())) for of in turns.values())
