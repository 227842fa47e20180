"""Records' pictures decoded, in order, by many threads."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedcmp.extract.encoders.base import LoadedEncoder
from fedcmp.extract.pictures import read_rgb
from fedcmp.extract.shortage import require_room, shortage
from fedcmp.extract.sources.base import NO_FILE
from fedcmp.pipeline.cache import STATUS, Row
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.records import Record

_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")


@dataclass(frozen=True)
class Decoded:
    """One record's row, and its picture prepared for the encoder; None where there is none."""

    row: Row
    pixels: np.ndarray | None


def decode(record: Record, encoder: LoadedEncoder) -> Decoded:
    """Read and prepare one picture.

    Raises:
        UserError: It cannot be read now, but perhaps later.
        MemoryError: So does whatever else `shortage` knows.
    """
    texts = tuple((text.kind, text.split, text.encode().decode()) for text in record.texts)

    def failed(status: str, reason: str, digest: str = "") -> Decoded:
        return Decoded(Row(record.id, digest, STATUS.index(status), reason, texts), None)

    try:
        data = record.read_image()
    except OSError as error:
        if shortage(error):
            raise
        if not isinstance(error, NO_FILE) and error.errno not in _NO_NAME:
            # Anything else may pass, and a hole in the cache would stay.
            raise UserError(f"{record.id}: cannot be read ({error}); fix that and rerun to go on") from None
        return failed("missing", str(error))
    digest = hashlib.sha256(data).hexdigest()
    try:
        image, notes = read_rgb(data, encoder.reading)
        pixels = encoder.preprocess(image)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        if shortage(error):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{record.id}: cannot be read ({error}); fix that and rerun to go on") from None
        # Pillow names the buffer by its address, which would differ from run to run.
        reason = _ADDRESS.sub("it", f"{type(error).__name__}: {error}")
        return failed("unreadable", reason, digest)
    return Decoded(Row(record.id, digest, 0, "", texts, notes), pixels)


def decode_all(records: Sequence[Record], first: Iterable[Decoded], encoder: LoadedEncoder) -> list[Decoded]:
    """What threads decoded, once all are idle; what failed is tried again alone before it is given up.

    Raises:
        MemoryError: There is too little memory to tell damage from a lack of memory.
    """
    decoded = list(first)
    for place, item in enumerate(decoded):
        if STATUS[item.row.status] == "unreadable":
            decoded[place] = decode(records[place], encoder)
            if decoded[place].row.status:
                require_room()
    return decoded
