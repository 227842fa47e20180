"""What sites reach of a server: the calls of Flower's fleet, from sites whose keys are known.

A SuperLink serves sites and app submitters on one port, and does not authenticate the latter. So it
listens on the loopback, and this listens outside, with TLS. A request passes as a whole or not at all,
rebuilt from what was parsed.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import h11

from fedcmp.federate.engines.flower.keys import RefusedError, caller
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError

_FLEET = b"/v1/fleet/"
_CALLS = frozenset(
    _FLEET + call
    for call in (
        b"activate-node",
        b"confirm-message-received",
        b"deactivate-node",
        b"get-fab",
        b"get-run",
        b"pull-messages",
        b"pull-object",
        b"push-messages",
        b"push-object",
        b"send-node-heartbeat",
    )
)
# Sites without keys make one up; with keys it is the server that knows them.
_KEYLESS = frozenset({_FLEET + b"register-node", _FLEET + b"unregister-node"})
_HEADERS = (b"accept", b"content-type", b"flwr-", b"x-flwr-")
# Flower cuts what it sends into pieces of 5 MiB.
_HEAD_BYTES, _BODY_BYTES, _ANSWER_BYTES = 2**14, 2**24, 2**26
_PIECE, _HEAD_PIECE = 2**18, 2**12
_HEAD_SECONDS, _BODY_SECONDS, _INNER_SECONDS, _IDLE_SECONDS = 10.0, 300.0, 60.0, 75.0
_CONNECTIONS, _FROM_ONE_PLACE = 512, 64
_NOT_ACTIVATED = 2004  # Flower's code, for SuperNodes to pass the reason on


class _StopError(Exception):
    """The connection ends after an answer."""

    def __init__(self, status: int, reason: str, code: int = 0) -> None:
        super().__init__(reason)
        self.status, self.code = status, code


class Gate:
    """Listens where sites come, while it is entered.

    Args:
        address: Where, as host:port.
        inner: Port of the SuperLink on 127.0.0.1.
        certificate: The server's certificate and its private key; None for no encryption.
        silos: Silos by public key in PEM; None where sites have no keys.
        authority: What the SuperLink's own certificate is checked with; None where it has none.

    Raises:
        UserError: The address is taken, or certificate and key do not fit.
    """

    def __init__(
        self,
        address: str,
        inner: int,
        certificate: tuple[Path, Path] | None,
        silos: Mapping[bytes, str] | None,
        authority: Path | None,
    ) -> None:
        self._inner, self._silos = inner, silos
        self._calls = _CALLS if silos is not None else _CALLS | _KEYLESS
        self._outside = _server_side(*certificate) if certificate else None
        self._inside = ssl.create_default_context(cafile=str(authority)) if authority else None
        self._places: Counter[str] = Counter()
        self._serving: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._told: set[str] = set()
        host, _, port = address.rpartition(":")
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # It listens when it is entered: until then sites are turned away, not kept waiting.
            self._socket.bind((host.strip("[]"), int(port)))
        except OSError as error:
            self._socket.close()
            raise UserError(f"--address {address}: cannot listen there ({error}); give another one") from None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Gate:
        self._thread.start()
        serving = asyncio.start_server(
            self._come,
            sock=self._socket,
            ssl=self._outside,
            limit=_PIECE,
            backlog=128,
            ssl_handshake_timeout=_HEAD_SECONDS if self._outside else None,
        )
        self._server = asyncio.run_coroutine_threadsafe(serving, self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._closed(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def close(self) -> None:
        """Listen no more, whether it was entered or not."""
        self._socket.close()

    async def _closed(self) -> None:
        # What has just come belongs to nobody yet: cancelled, or with its server closed, it would stay open.
        self._loop.remove_reader(self._socket)
        await asyncio.sleep(0)
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for writer in self._serving.values():
                writer.transport.abort()
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(0)
        self._server.close()
        await asyncio.sleep(0.05)  # transports close in the loop's next turns

    def _come(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._serving[task] = writer
        task.add_done_callback(self._serving.pop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        place = str((writer.get_extra_info("peername") or ("?",))[0])
        crowded = sum(self._places.values()) >= _CONNECTIONS
        # Behind a proxy of this machine all come from one place.
        crowded |= self._places[place] >= _FROM_ONE_PLACE and not place.startswith(("127.", "::1"))
        self._places[place] += 1
        try:
            if not crowded:
                await self._answer(reader, writer)
        except (OSError, TimeoutError, h11.ProtocolError, asyncio.CancelledError):
            pass  # one connection's end, or the gate's
        finally:
            self._places[place] -= 1
            self._places += Counter()  # forgets places with none
            writer.close()
            with suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), _HEAD_SECONDS)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection, seconds = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES), _HEAD_SECONDS
        while True:
            try:
                status, kind, body = await self._one(connection, reader, seconds)
            except h11.RemoteProtocolError as error:
                status, kind, body = error.error_status_hint, b"text/plain", b"not understood"
                last = True
            except _StopError as stop:
                status, kind = stop.status, b"application/json"
                body = json.dumps({"code": stop.code, "detail": str(stop)}).encode()
                last = True
            else:
                last = False
            headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
            headers += [(b"connection", b"close")] if last else []
            writer.write(connection.send(h11.Response(status_code=status, headers=headers)) or b"")
            writer.write(connection.send(h11.Data(data=body)) or b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            await asyncio.wait_for(writer.drain(), _BODY_SECONDS)
            if last or connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return
            connection.start_next_cycle()
            seconds = _IDLE_SECONDS

    async def _one(
        self, connection: h11.Connection, reader: asyncio.StreamReader, seconds: float
    ) -> tuple[int, bytes, bytes]:
        """One request, and the SuperLink's status, content type and body."""
        request = await asyncio.wait_for(_event(connection, reader, _HEAD_PIECE), seconds)
        if not isinstance(request, h11.Request):
            raise ConnectionResetError
        headers = dict(request.headers)
        if request.method != b"POST" or request.target not in self._calls:
            raise _StopError(404, "nothing is here but the calls of sites")
        if self._silos is not None:
            try:
                caller(headers, self._silos)
            except RefusedError as error:
                self._tell(str(error))
                raise _StopError(400, str(error), _NOT_ACTIVATED) from None
        body = await asyncio.wait_for(_body(connection, reader, _BODY_BYTES), _BODY_SECONDS)
        try:
            return await asyncio.wait_for(self._passed_on(request.target, headers, body), _INNER_SECONDS)
        except (OSError, TimeoutError, h11.ProtocolError):
            raise _StopError(503, "the server is not ready") from None

    async def _passed_on(
        self, target: bytes, headers: Mapping[bytes, bytes], body: bytes
    ) -> tuple[int, bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._inner, ssl=self._inside)
        try:
            connection = h11.Connection(h11.CLIENT)
            kept = [(name, value) for name, value in headers.items() if name.startswith(_HEADERS)]
            kept = [(name, value) for name, value in kept if name != b"accept-encoding"]
            kept += [(b"host", f"127.0.0.1:{self._inner}".encode()), (b"connection", b"close")]
            kept += [(b"content-length", str(len(body)).encode())]
            writer.write(connection.send(h11.Request(method=b"POST", target=target, headers=kept)) or b"")
            writer.write(connection.send(h11.Data(data=body)) or b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            await writer.drain()
            response = await _event(connection, reader)
            if not isinstance(response, h11.Response):
                raise ConnectionResetError
            answer = await _body(connection, reader, _ANSWER_BYTES)
            return response.status_code, dict(response.headers).get(b"content-type", b""), answer
        finally:
            writer.transport.abort()

    def _tell(self, reason: str) -> None:
        """Say it, but not for ever: a stranger can come as often as it likes."""
        kind = reason.partition(" is ")[0]
        if kind not in self._told:
            self._told.add(kind)
            say(f"refused: {reason}")


async def _event(connection: h11.Connection, reader: asyncio.StreamReader, piece: int = _PIECE) -> object:
    while True:
        event = connection.next_event()
        if event is not h11.NEED_DATA:
            return event
        connection.receive_data(await reader.read(piece))


async def _body(connection: h11.Connection, reader: asyncio.StreamReader, most: int) -> bytes:
    body = bytearray()
    while True:
        event = await _event(connection, reader)
        if isinstance(event, h11.EndOfMessage):
            return bytes(body)
        if not isinstance(event, h11.Data):
            raise ConnectionResetError
        body += event.data
        if len(body) > most:
            raise _StopError(413, f"more than {most} bytes")


def _server_side(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"--certificate {certificate} and --key {key}: no certificate with its private key ({error}); "
            "give PEM files that belong together"
        ) from None
    return context
