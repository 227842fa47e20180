"""What clients keep from round to round where they train, such as what compression has left out."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save

from fedcmp.federate.arithmetic.updates import State
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import write_atomic


class Kept:
    """A folder with a file a client and round.

    The server says which of a client's answers it has counted last, as a round may be done again after
    an interruption, and an answer may come too late.

    Args:
        folder: Where it lies.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, client: str, round_: int) -> Path:
        return self._folder / client / f"{round_}.safetensors"

    def after(self, client: str, round_: int | None) -> State:
        """What was kept with a client's answer of a round; nothing where it has answered none.

        Raises:
            UserError: It was lost.
        """
        if round_ is None:
            return {}
        path = self._path(client, round_)
        if not path.is_file():
            raise UserError(
                f"{path}: missing, so what client '{client}' kept is lost; put the file back, or start the "
                "run over"
            )
        return load_file(path)

    def keep(self, client: str, round_: int, left: State, counted: int | None) -> None:
        """Keep something with a round's answer, besides what was kept with the last counted one."""
        path = self._path(client, round_)
        write_atomic(path, save(left))
        for old in path.parent.iterdir():
            if old.name not in (path.name, f"{counted}.safetensors"):
                old.unlink()
