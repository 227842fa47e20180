"""Which cached picture a document of somebody else's data set means: by name, or by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.errors import UserError


class Lookup:
    """Finds pictures in a cache.

    Args:
        cache: Has the features.
        image_name: How a document's fields become the name that the cache knows, such as
            `{image_source}.jpg`; a field that holds a picture stands for the SHA-256 of its file.
    """

    def __init__(self, cache: FeatureCache, image_name: str) -> None:
        self._cache, self._image_name = cache, image_name
        digests = [digest.tobytes().hex() for digest in cache.array("images/sha256")]
        known = [*enumerate(digests), *enumerate(cache.ids)]
        self.rows = {key: row for row, key in known if cache.status[row] == 0}

    def find(self, document: Mapping[str, Any], place: str) -> str:
        """The key in `rows` of a document's picture.

        Args:
            document: Its fields; a picture as `{"bytes": ..., "path": ...}`.
            place: Names the document.

        Raises:
            UserError: It has no such fields, or the picture has no features.
        """
        fields = {name: _named(value) for name, value in document.items()}
        told = f"its fields: {', '.join(fields)}"
        try:
            image = self._image_name.format_map(fields)
        except (KeyError, ValueError) as error:
            raise UserError(f"{place}: image_name={self._image_name} does not fit: {error}; {told}") from None
        if image not in self.rows:
            raise UserError(
                f"{place}: no features of '{image}' in {self._cache.path}; extract it, or say with "
                f"image_name=... how the document names its picture; {told}"
            )
        return image


def _named(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1:
        return _named(value[0])
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        data = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        return hashlib.sha256(data).hexdigest()
    return value
