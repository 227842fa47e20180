"""Processes that torchrun started: rank 0 leads, and the others do what it says.

A connection from every other rank to rank 0 carries messages. A process that dies ends its connection, so all
of them learn at once which one is missing, also while they compute or wait within torch.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from fedcmp.pipeline.console import complain
from fedcmp.pipeline.errors import UserError, one_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# Until a process that is told of another's end ends itself, whatever it is waiting for.
_GRACE = 5.0
# Seconds until a machine that is cut off counts as dead: idle, then between probes, and how many of these.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 4))

Message = tuple[dict[str, Any], bytes]


def place(environment: Mapping[str, str]) -> tuple[int, int]:
    """The rank of this process and the number of all, as torchrun says; `(0, 1)` where it said nothing.

    Raises:
        UserError: What is said is no rank.
    """
    rank, count = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={count}: no rank of so many; unset both, or start with torchrun"
        )
    return int(rank), int(count)


def refuse_ranks(what: str) -> None:
    """Refuse to run under torchrun what is one process.

    Raises:
        UserError: There are several.
    """
    _, count = place(os.environ)
    if count > 1:
        raise UserError(
            f"{what}: is one process, and torchrun has started {count}; start it without torchrun"
        )


@contextmanager
def joined() -> Iterator[Ranks | None]:
    """Take part in what torchrun has started; None where this process is the only one.

    Raises:
        UserError: From another rank than 0, whatever error is raised inside, with its rank.
        SystemExit: Another rank has died or failed, which has been said.
    """
    rank, count = place(os.environ)
    if count == 1:
        yield None
        return
    ranks = Ranks(rank, count)
    try:
        yield ranks
    except BaseException as error:
        ranks.leave(one_line(error))
        if isinstance(error, UserError) and not ranks.leads:
            raise UserError(f"rank {rank} of {count}: {error}") from None
        raise
    ranks.leave(None)


class Ranks:
    """This process among those that torchrun started.

    Args:
        rank: Its number, from 0.
        count: How many there are, at least two.

    Attributes:
        store: Torch's, for process groups.
    """

    def __init__(self, rank: int, count: int) -> None:
        from torch.distributed.rendezvous import rendezvous

        self.rank, self.count = rank, count
        self.store: Store = next(iter(rendezvous("env://")))[0]
        self._connections = self._listened() if self.leads else {0: self._connected()}
        self._messages: dict[int, SimpleQueue[Message | None]] = {
            other: SimpleQueue() for other in self._connections
        }
        self._sending, self._busy = threading.Lock(), False
        self._ended, self._failed = threading.Event(), threading.Event()
        for connection in self._connections.values():
            _keep_alive(connection)
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def tell(self, content: dict[str, Any], data: bytes = b"") -> None:
        """Send JSON and bytes to all that rank 0 has a connection to, or from another rank to rank 0."""
        with self._sending:
            for connection in self._connections.values():
                # Whoever watches the connection says what has happened to it.
                with suppress(OSError):
                    connection.send_bytes(json.dumps(content).encode())
                    connection.send_bytes(data)

    def told(self) -> Message | None:
        """What rank 0 says next; None at the end.

        Raises:
            SystemExit: Another rank has died or failed.
        """
        return self._next(0)

    def answers(self) -> dict[int, dict[str, Any]]:
        """What every other rank says next, by its number.

        Raises:
            SystemExit: One of them has died or failed.
        """
        found = {other: self._next(other) for other in self._connections}
        return {other: message[0] for other, message in found.items() if message is not None}

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Between these all ranks depend on each other: an error in one of them ends all."""
        self._busy = True
        try:
            yield
        except RuntimeError as error:
            # Torch finds first that a process is gone, and does not know which.
            if self._failed.wait(_GRACE):
                raise SystemExit(2) from None
            self._spoil(error)
            raise
        except Exception as error:
            self._spoil(error)
            raise
        self._busy = False

    def leave(self, why: str | None) -> None:
        """Tell the others that this process ends, and why if not in good order."""
        if self._failed.is_set():
            return
        self._ended.set()
        if why is not None and (self._busy or not self.leads):
            self.tell({"failed": why, "rank": self.rank})
        elif self.leads:
            self.tell({"end": True})

    def _spoil(self, error: Exception) -> None:
        """End all: the others are amid something that cannot be finished."""
        if self.leads:
            self.leave(one_line(error))
            self._failed.set()
            threading.Thread(target=self._exit, args=(2,), daemon=True).start()

    def _next(self, other: int) -> Message | None:
        message = self._messages[other].get()
        if message is None and self._failed.is_set():
            raise SystemExit(2)
        return message

    def _watch(self) -> None:
        """Sort what comes in, and notice who is gone."""
        open_ = {connection: other for other, connection in self._connections.items()}
        while open_:
            for connection in wait(list(open_)):
                assert isinstance(connection, Connection)
                other = open_[connection]
                try:
                    content, data = json.loads(connection.recv_bytes()), connection.recv_bytes()
                except (EOFError, OSError):
                    if not self._ended.is_set():
                        self._fail(other, "died")
                    del open_[connection]
                    continue
                if "failed" in content:
                    self._fail(content["rank"], f"failed: {content['failed']}")
                elif "end" in content:
                    self._ended.set()
                    self._messages[other].put(None)
                    self._exit(0)
                else:
                    self._messages[other].put((content, data))

    def _fail(self, rank: int, how: str) -> None:
        """Say who has ended everything, pass it on, and end."""
        if self._ended.is_set():
            return
        complain(f"fedcmp: rank {rank} of {self.count} {how}; run the same command to go on")
        if self.leads and self._sending.acquire(timeout=_GRACE):
            self._sending.release()
            self.tell({"failed": how.removeprefix("failed: "), "rank": rank})
        self._failed.set()
        for messages in self._messages.values():
            messages.put(None)
        self._exit(2)

    @staticmethod
    def _exit(code: int) -> None:
        """End this process if it has not ended by itself: it may wait for ever for one that is gone."""
        time.sleep(_GRACE)
        os._exit(code)

    def _listened(self) -> dict[int, Connection]:
        """Rank 0's connections, by the rank at the other end."""
        key, host = secrets.token_bytes(32), os.environ["MASTER_ADDR"]
        try:
            listener = Listener((host, 0), backlog=self.count, authkey=key)
        except OSError:  # a name for this machine that is not its own
            listener = Listener(("", 0), backlog=self.count, authkey=key)
        self.store.set("fedcmp", json.dumps([listener.address[1], key.hex()]))
        found: dict[int, Connection] = {}
        with listener:
            while len(found) < self.count - 1:
                with suppress(AuthenticationError, EOFError, OSError):
                    connection = listener.accept()
                    found[json.loads(connection.recv_bytes())] = connection
        return dict(sorted(found.items()))

    def _connected(self) -> Connection:
        port, key = json.loads(self.store.get("fedcmp"))
        connection = Client((os.environ["MASTER_ADDR"], port), authkey=bytes.fromhex(key))
        connection.send_bytes(json.dumps(self.rank).encode())
        return connection


def _keep_alive(connection: Connection) -> None:
    """Notice a machine that is gone without a word."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            end.setsockopt(socket.IPPROTO_TCP, option, value)
