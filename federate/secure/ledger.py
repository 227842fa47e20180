"""What a client has given away of the updates of a run, kept where it survives restarts.

Sums of one update with different weights are equations in it, and a client that has forgotten the first two
would give a third. A sum that it has given before says nothing new and is given again, unless noise is drawn
anew with every training: then it is another one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcmp.federate.secure.numbers import LEAST
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import locked, read_json, write_json
from fedcmp.pipeline.hashes import fingerprint

RELEASES = "releases"
_SUMS = 2


class Ledger:
    """Releases of one client's updates, a JSON file by round.

    Args:
        folder: Where it lies.
        agreed: What decides the updates: with other options they are others.
        client: The client.
        noisy: Whether an update that is computed again is not the same.
    """

    def __init__(self, folder: Path, agreed: Any, client: str, noisy: bool) -> None:
        self._path = folder / f"{client}-{fingerprint(agreed)[:16]}.json"
        self._client, self._noisy = client, noisy

    def begin(self, round_: int, start: Mapping[str, Tensor]) -> None:
        """Note what a round's update starts from.

        Raises:
            UserError: It was done before from another projector: nearly the same update, released anew.
        """
        digest = sha256()
        for name in sorted(start):
            digest.update(name.encode() + start[name].detach().cpu().contiguous().numpy().tobytes())
        with locked(self._path.with_suffix(".lock"), str(self._path), wait=True):
            book = read_json(self._path) or {}
            entry = book.setdefault(str(round_), {"start": digest.hexdigest(), "sums": [], "cosines": None})
            if entry["start"] != digest.hexdigest() and (entry["sums"] or entry["cosines"]):
                raise UserError(
                    f"client '{self._client}' has given sums of round {round_ + 1} from another projector; "
                    f"a run that starts over needs another name, or its site's consent: remove {self._path}"
                )
            entry["start"] = digest.hexdigest()
            write_json(self._path, book)

    def release(self, round_: int, what: str, survivors: Collection[str]) -> None:
        """Note a sum before it is unmasked.

        Args:
            round_: The round.
            what: Hash of what is summed, and over whom.
            survivors: Who is in it.

        Raises:
            ValueError: There were two others, or too few are in it to be the second.
        """

        def note(entry: dict[str, Any]) -> None:
            others = [each for each in entry["sums"] if self._noisy or each != what]
            if len(others) >= _SUMS:
                raise ValueError(
                    f"client '{self._client}' refuses: it has given {_SUMS} sums of its update of round "
                    f"{round_ + 1}, and a third would help to compute it; its site's consent is to remove "
                    f"{self._path}"
                )
            if others and len(survivors) <= LEAST:
                raise ValueError(
                    f"client '{self._client}' refuses a second sum over {len(survivors)} clients: there "
                    f"must be more than {LEAST}"
                )
            entry["sums"] = [*others, what]

        self._noted(round_, note)

    def tell(self, round_: int, question: str) -> None:
        """Note that the client says how its update compares with a consensus.

        Raises:
            ValueError: It has said so of another one.
        """

        def note(entry: dict[str, Any]) -> None:
            if entry["cosines"] not in (None, question):
                raise ValueError(
                    f"client '{self._client}' refuses: told again and again it would reveal its update"
                )
            entry["cosines"] = question

        self._noted(round_, note)

    def _noted(self, round_: int, note: Any) -> None:
        with locked(self._path.with_suffix(".lock"), str(self._path), wait=True):
            book = read_json(self._path) or {}
            note(book[str(round_)])
            write_json(self._path, book)
