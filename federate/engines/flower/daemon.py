"""A site's long-lived process answers short-lived ones over a Unix socket.

The socket lies in a folder that only its owner can enter. A message is two lengths, JSON and
safetensors; an answer has a leading byte that says whether it is an error.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedcmp.federate.engines.service import Service

_LENGTHS = struct.Struct(">QQ")
_PIECE = 2**20


class SiteGoneError(Exception):
    """The site's daemon is not there, or went away before it answered."""


def ask(path: Path, parts: tuple[str, bytes], seconds: float) -> tuple[str, bytes]:
    """Send a request and wait for the answer.

    Args:
        path: The daemon's socket.
        parts: JSON and safetensors.
        seconds: How long to wait.

    Raises:
        SiteGoneError: There is no daemon, or it died or took too long.
        ValueError: What the daemon objects to.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        try:
            connection.connect(str(path))
            _write(connection, b"\0", *parts)
            failed, text, tensors = _read(connection)
        except OSError as error:
            raise SiteGoneError(f"the site's daemon does not answer ({error})") from None
    if failed:
        raise ValueError(text)
    return text, tensors


def answered(service: Service, parts: tuple[str, bytes]) -> tuple[str, bytes]:
    """What a service answers to a packed request.

    Raises:
        UserError: What it objects to.
    """
    from fedcmp.federate.engines.wire import Payload, pack, unpack

    payload = pack(service.handle(unpack(Payload(*parts))))
    return payload.text, payload.tensors


def listen(path: Path) -> socket.socket:
    """A socket that `serve` accepts from."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen(8)
    return server


def serve(server: socket.socket, service: Service) -> None:
    """Answer one request after the other, until the socket is shut down."""
    from fedcmp.pipeline.console import say
    from fedcmp.pipeline.errors import one_line

    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            try:
                _, text, tensors = _read(connection)
                text, tensors = answered(service, (text, tensors))
                _write(connection, b"\0", text, tensors)
            except OSError as error:
                say(f"the server no longer waits for an answer ({error})")
            except Exception as error:
                # Whatever goes wrong with one request, the next one finds the model loaded.
                say(f"refused: {one_line(error)}")
                try:
                    _write(connection, b"\1", str(error) or type(error).__name__, b"")
                except OSError:
                    continue


def _write(connection: socket.socket, flag: bytes, text: str, tensors: bytes) -> None:
    data = text.encode()
    connection.sendall(flag + _LENGTHS.pack(len(data), len(tensors)) + data)
    connection.sendall(tensors)


def _read(connection: socket.socket) -> tuple[bool, str, bytes]:
    head = _exactly(connection, 1 + _LENGTHS.size)
    text, tensors = (_exactly(connection, length) for length in _LENGTHS.unpack(head[1:]))
    return head[0] == 1, text.decode(), tensors


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view, min(len(view), _PIECE))
        if not count:
            raise ConnectionResetError("the connection was closed before the whole message came")
        view = view[count:]
    return bytes(data)
