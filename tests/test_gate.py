"""What somebody can do who reaches a server's port: nothing, unless a site of the study."""

from __future__ import annotations

import base64
import datetime
import gc
import http.server
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from test_flower import ENVIRONMENT, documented, until
from test_sites import SILOS, FakeLink, over, projector, sites_config  # noqa: F401

pytest.importorskip("flwr", reason="needs the extra [flower]")

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedcmp.components import load
from fedcmp.federate.engines.flower import gate as gates
from fedcmp.federate.engines.flower.gate import Gate
from fedcmp.federate.engines.flower.keys import Keys, check_place, public_key, signing, site_keys
from fedcmp.federate.engines.flower.processes import environment, free_port
from fedcmp.federate.engines.flower.superlink import superlink
from fedcmp.federate.engines.service import Service
from fedcmp.federate.run import run
from fedcmp.pipeline.errors import UserError

HEARTBEAT = b"/v1/fleet/send-node-heartbeat"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates and keys, made by the commands of docs/sites.md."""
    authority, site_key = documented()[:2]
    folder = tmp_path_factory.mktemp("keys")
    (folder / "known").mkdir()
    for script in [authority, *(site_key.replace("berlin", name) for name in (*SILOS, "stranger"))]:
        subprocess.run(["sh", "-ec", script], cwd=folder, check=True, capture_output=True)
    for name in SILOS:
        shutil.move(folder / f"{name}.pub", folder / "known")
    return folder


def signed(keys: Path, name: str, late: float = 0.0) -> dict[bytes, bytes]:
    """Headers of a SuperNode with that key, whose clock is late."""
    private = load_ssh_private_key((keys / name).read_bytes(), None)
    public = keys / "known" / f"{name}.pub"
    at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=late)
    signature = private.sign(at.isoformat().encode(), ec.ECDSA(SHA256()))
    known = public_key(public if public.exists() else keys / f"{name}.pub")
    return {
        b"flwr-public-key": base64.b64encode(known),
        b"flwr-timestamp": at.isoformat().encode(),
        b"flwr-signature": base64.b64encode(signature),
    }


class Inside(http.server.BaseHTTPRequestHandler):
    """Stands in for a SuperLink; remembers what came."""

    came: list[tuple[str, dict[str, str], bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.came.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.end_headers()
        self.wfile.write(b"yes" * 1000)

    do_GET = do_POST

    def log_message(self, *words: object) -> None:
        """Quiet."""


@pytest.fixture
def inside() -> Iterator[http.server.ThreadingHTTPServer]:
    Inside.came = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Inside)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def gate(keys: Path, inside: http.server.ThreadingHTTPServer) -> Iterator[int]:
    """The port of a gate with TLS and the known keys."""
    port = free_port()
    known = {public_key(keys / "known" / f"{silo}.pub"): silo for silo in SILOS}
    certificate = keys / "server.crt", keys / "server.key"
    listener = Gate(f"127.0.0.1:{port}", inside.server_address[1], certificate, known, None)
    with listener:
        yield port
    listener.close()


def connected(port: int, keys: Path) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    plain = socket.create_connection(("127.0.0.1", port), timeout=20)
    return context.wrap_socket(plain, server_hostname="localhost")


def answer(sock: ssl.SSLSocket) -> bytes:
    """All that comes until the other side closes."""
    said = b""
    try:
        while data := sock.recv(65536):
            said += data
    except OSError:
        pass
    return said


def asked(
    port: int,
    keys: Path,
    target: bytes,
    headers: dict[bytes, bytes],
    body: bytes = b"",
    method: bytes = b"POST",
) -> bytes:
    lines = [method + b" " + target + b" HTTP/1.1", b"host: x"]
    lines += [name + b": " + value for name, value in headers.items()]
    if b"content-length" not in headers and b"transfer-encoding" not in headers:
        lines += [b"content-length: %d" % len(body)]
    with connected(port, keys) as sock:
        try:
            sock.sendall(b"\r\n".join([*lines, b"connection: close", b"", b""]) + body)
        except OSError:
            pass
        return answer(sock)


def test_a_site_gets_through_whole(gate: int, keys: Path) -> None:
    body = bytes(range(256)) * 30_000
    more = {b"content-type": b"application/x-protobuf", b"x-forwarded-for": b"10.1.1.1", b"cookie": b"a=b"}
    said = asked(gate, keys, HEARTBEAT, signed(keys, "lab") | more, body)
    assert said.startswith(b"HTTP/1.1 200")
    assert said.endswith(b"yes" * 1000)
    ((path, headers, came),) = Inside.came
    assert (path, came) == (HEARTBEAT.decode(), body)
    assert headers["content-type"] == "application/x-protobuf"
    assert not headers.keys() & {"cookie", "x-forwarded-for"}


def test_one_connection_serves_many_requests(gate: int, keys: Path) -> None:
    lines = [b"%s: %s" % pair for pair in signed(keys, "clinic").items()]
    head = b"\r\n".join([b"POST " + HEARTBEAT + b" HTTP/1.1", b"host: x", b"content-length: 3", *lines])
    with connected(gate, keys) as sock:
        for _ in range(3):
            sock.sendall(head + b"\r\n\r\nabc")
            said = b""
            while not said.endswith(b"yes" * 1000):
                said += sock.recv(65536)
        assert len(Inside.came) == 3


@pytest.mark.parametrize(
    ("method", "target"),
    [
        (b"POST", b"/v1/control/start-run"),
        (b"POST", b"/v1/control/register-node"),
        (b"POST", b"/v1/control/list-runs"),
        (b"POST", b"/v1/runtime/get-nodes"),
        (b"POST", b"/v1/runtime/pull-messages"),
        (b"POST", b"/v1/fleet/register-node"),
        (b"POST", b"/v1/fleet/unregister-node"),
        (b"POST", b"/v1/fleet/../control/start-run"),
        (b"POST", b"/v1/fleet/%2e%2e/control/start-run"),
        (b"POST", b"/v1/fleet/pull-messages/../../control/start-run"),
        (b"POST", b"//v1/control/start-run"),
        (b"POST", b"http://127.0.0.1/v1/control/start-run"),
        (b"POST", HEARTBEAT + b"?x"),
        (b"POST", HEARTBEAT + b"/"),
        (b"GET", HEARTBEAT),
        (b"PUT", HEARTBEAT),
        (b"GET", b"/"),
        (b"GET", b"/docs"),
        (b"GET", b"/openapi.json"),
        (b"GET", b"/health"),
        (b"CONNECT", b"127.0.0.1:22"),
    ],
)
def test_nothing_but_the_fleets_calls_gets_through(
    gate: int, keys: Path, method: bytes, target: bytes
) -> None:
    """Not even with a site's key."""
    said = asked(gate, keys, target, signed(keys, "lab"), method=method)
    assert said.split(b" ")[1] in (b"400", b"404"), said
    assert Inside.came == []


def test_a_stranger_gets_nothing_through(gate: int, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, lab = signed(keys, "stranger"), signed(keys, "lab")
    for headers in (
        {},
        own,
        own | {b"flwr-public-key": lab[b"flwr-public-key"]},
        lab | {b"flwr-signature": own[b"flwr-signature"]},
        lab | {b"flwr-timestamp": own[b"flwr-timestamp"]},
        lab | {b"flwr-timestamp": b"now"},
        lab | {b"flwr-public-key": b"\xff"},
        {b"flwr-public-key": b"", b"flwr-signature": b"", b"flwr-timestamp": b""},
    ):
        said = asked(gate, keys, HEARTBEAT, headers, b"x" * 1000)
        assert said.startswith(b"HTTP/1.1 400")
        detail = json.loads(said.partition(b"\r\n\r\n")[2])["detail"]
        assert detail == "this key is no site's of the study; give the server the .pub file"
    assert Inside.came == []
    assert capsys.readouterr().out.count("refused") == 1


@pytest.mark.parametrize(
    ("late", "words"), [(400, "400 s behind the server's"), (-8, "8 s ahead of the server's"), (200, None)]
)
def test_a_wrong_clock_is_measured_and_named(
    gate: int, keys: Path, late: float, words: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    said = asked(gate, keys, HEARTBEAT, signed(keys, "lab", late))
    if words is None:
        assert said.startswith(b"HTTP/1.1 200")
        return
    assert Inside.came == []
    wanted = f"the clock of site 'lab' is {words}; set both clocks"
    assert wanted in said.decode()
    assert wanted in capsys.readouterr().out


def test_two_lengths_or_too_long(gate: int, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that two programs could read in two ways, and nothing without bounds."""
    lab = signed(keys, "lab")
    both = {b"content-length": b"3", b"transfer-encoding": b"chunked"}
    smuggled = b"0\r\n\r\nPOST /v1/control/list-runs HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    asked(gate, keys, HEARTBEAT, lab | both, smuggled)
    assert [path for path, _, _ in Inside.came if path != HEARTBEAT.decode()] == []
    Inside.came.clear()
    assert b" 400 " in asked(gate, keys, HEARTBEAT, lab | {b"content-length": b"3, 4"}, b"abcd")[:20]
    assert b" 431 " in asked(gate, keys, HEARTBEAT, lab | {b"x": b"y" * 20_000})[:20]
    monkeypatch.setattr(gates, "_BODY_BYTES", 10_000)
    assert b" 413 " in asked(gate, keys, HEARTBEAT, lab, bytes(20_000))[:20]
    assert Inside.came == []


def test_whoever_says_nothing_is_cut_off(gate: int, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_HEAD_SECONDS", 0.5)
    monkeypatch.setattr(gates, "_BODY_SECONDS", 0.5)
    began = time.monotonic()
    with connected(gate, keys) as silent, connected(gate, keys) as slow:
        slow.sendall(b"POST " + HEARTBEAT + b" HTTP/1.1\r\nhost: x\r\n")
        assert answer(silent) == answer(slow) == b""
    lab = signed(keys, "lab")
    assert asked(gate, keys, HEARTBEAT, lab | {b"content-length": b"1000"}, b"half") == b""
    assert time.monotonic() - began < 15
    assert Inside.came == []


def test_there_are_so_many_connections_and_no_more(
    gate: int, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "_CONNECTIONS", 3)
    held = [connected(gate, keys) for _ in range(3)]
    time.sleep(0.2)
    assert asked(gate, keys, HEARTBEAT, signed(keys, "lab")) == b""
    for each in held:
        each.close()
    time.sleep(0.5)
    assert asked(gate, keys, HEARTBEAT, signed(keys, "lab")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_gate_that_closes_closes_every_connection(
    keys: Path, inside: http.server.ThreadingHTTPServer, encrypted: bool
) -> None:
    """Also those that have just come, are within their handshake, or wait for the rest of a request."""
    certificate = (keys / "server.crt", keys / "server.key") if encrypted else None
    with warnings.catch_warnings(record=True) as left:
        warnings.simplefilter("always", ResourceWarning)
        for _ in range(5):
            port = free_port()
            gate = Gate(f"127.0.0.1:{port}", inside.server_address[1], certificate, None, None)
            with gate:
                silent = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(8)]
                if encrypted:
                    silent += [connected(port, keys) for _ in range(2)]
                silent[-1].sendall(b"POST / HTTP/1.1\r\n")
                silent += [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(8)]
            gate.close()
            for each in silent:
                with suppress(ConnectionResetError):
                    assert each.recv(1) == b""
                each.close()
            gc.collect()
    assert not [str(each.message) for each in left if "127.0.0.1" in str(each.message)]
    assert not [str(each.message) for each in left if "transport" in str(each.message)]


def test_a_superlink_that_is_not_there(
    gate: int, keys: Path, inside: http.server.ThreadingHTTPServer
) -> None:
    """SuperNodes try again after 503."""
    inside.socket.close()
    assert asked(gate, keys, HEARTBEAT, signed(keys, "lab")).startswith(b"HTTP/1.1 503")


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "192.168.1.5:1", "[::]:1", "server.example.org:1", "10.0.0.1:1"]
)
def test_without_encryption_there_is_this_machine_alone(address: str) -> None:
    with pytest.raises(UserError, match=r"--address .*: --insecure is for 127.0.0.1 only"):
        check_place("--address", address, insecure=True)
    check_place("--address", address, insecure=False)
    for here in ("127.0.0.1:1", "[::1]:1", "localhost:1", "127.8.8.8:1"):
        check_place("--address", here, insecure=True)


@pytest.mark.parametrize("address", ["", "18080", "host:", ":1", "host:x", "host:99999"])
def test_an_address_has_host_and_port(address: str) -> None:
    with pytest.raises(UserError, match="expected HOST:PORT"):
        check_place("--superlink", address, insecure=False)


def test_every_silo_has_a_key_of_its_own(keys: Path, tmp_path: Path) -> None:
    known = keys / "known"
    assert site_keys(known, SILOS) == {silo: known / f"{silo}.pub" for silo in SILOS}
    with pytest.raises(UserError, match=r"no lyon.pub; put every site's public key there"):
        site_keys(known, [*SILOS, "lyon"])
    for name in SILOS:
        shutil.copy(known / "lab.pub", tmp_path / f"{name}.pub")
    with pytest.raises(UserError, match=r"lab.pub: the same key as clinic.pub"):
        site_keys(tmp_path, SILOS)
    (tmp_path / "lab.pub").write_text("ssh-ed25519 AAAA x")
    with pytest.raises(UserError, match=r"lab.pub: no public key of an elliptic curve"):
        site_keys(tmp_path, SILOS)


SERVER_APP = """
import time
import warnings
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

Path("{out}/ran-server").touch()
server_app = ServerApp()


@server_app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    message = Message(RecordDict(), dst_node_id=nodes[0], message_type="query", ttl=300)
    sent = list(grid.push_messages([message]))
    while not (replies := list(grid.pull_messages(sent))):
        time.sleep(0.2)
    Path("{out}/reply").write_text(str(replies[0].error) if replies[0].has_error() else "it ran")
"""
CLIENT_APP = """
from pathlib import Path
from flwr.clientapp import ClientApp

Path("{out}/ran-client").touch()
client_app = ClientApp()
"""


def foreign_app(folder: Path, out: Path) -> Path:
    """An app of somebody else's, which leaves files where it runs."""
    app = folder / "app"
    app.mkdir(parents=True)
    (app / "evil_server.py").write_text(SERVER_APP.replace("{out}", str(out)))
    (app / "evil_client.py").write_text(CLIENT_APP.replace("{out}", str(out)))
    (app / "pyproject.toml").write_text(
        '[project]\nname = "evil"\nversion = "1.0.0"\nlicense = "Apache-2.0"\n[tool.flwr.app]\n'
        'publisher = "x"\n[tool.flwr.app.components]\nserverapp = "evil_server:server_app"\n'
        'clientapp = "evil_client:client_app"\n'
    )
    return app


def test_sites_sign_with_their_keys(keys: Path) -> None:
    """What one site signs the others know for its own."""
    known = keys / "known"
    lab, clinic = (signing(keys / name, known, name, SILOS) for name in ("lab", "clinic"))
    signature = lab.sign(b"text")
    assert clinic.verify("lab", b"text", signature)
    assert not clinic.verify("lab", b"other", signature)
    assert not clinic.verify("practice", b"text", signature)
    assert not clinic.verify("nobody", b"text", signature)
    with pytest.raises(UserError, match=r"another key than .*lab.pub"):
        signing(keys / "stranger", known, "lab", SILOS)
    with pytest.raises(UserError, match="no private key of an elliptic curve"):
        signing(known / "lab.pub", known, "lab", SILOS)


def test_a_run_whose_sums_are_signed(keys: Path, sites_config: Path, tmp_path: Path) -> None:  # noqa: F811
    """Ends in the bytes of one without signatures."""
    plain, remote = (
        load(
            sites_config,
            ["federate.privacy.secure=true", "federate.rounds=2", f"run={name}", f"build={tmp_path}"],
        )
        for name in ("plain", "signed")
    )
    run(plain)
    steps = []

    class Watched(Service):
        def handle(self, request: dict) -> dict:
            steps.append(request.get("step", {}).get("step"))
            return super().handle(request)

    sites = {
        node: Watched(remote, silo, signing(keys / silo, keys / "known", silo, SILOS))
        for node, silo in enumerate(SILOS)
    }
    run(remote, over(FakeLink(sites)))
    assert projector(plain) == projector(remote)
    assert steps.count("agree on") == 6


def test_holding_the_authoritys_certificate_alone(keys: Path, tmp_path: Path) -> None:
    """Flower's own commands: register a node, run an app, list what is there; then a site that may."""
    home, port = tmp_path / "server", free_port()
    home.mkdir()
    files = Keys(certificate=keys / "server.crt", key=keys / "server.key", sites=keys / "known")
    attacker = tmp_path / "attacker"
    app = foreign_app(attacker, tmp_path)
    (attacker / "config.toml").write_text(
        f'[superlink.run]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{keys / "ca.crt"}"\n'
    )
    with superlink(f"127.0.0.1:{port}", files, {"lab": keys / "known/lab.pub"}, home) as server:
        for command in (
            ["supernode", "register", str(keys / "stranger.pub"), "run"],
            ["run", str(app), "run"],
            ["ls", "run"],
            ["supernode", "list", "run"],
        ):
            done = subprocess.run(
                ["flwr", *command], env=environment(attacker), capture_output=True, text=True, timeout=120
            )
            said = done.stdout + done.stderr
            assert done.returncode != 0, said
            assert "404" in said or "nothing is here" in said, said
        # The same commands within the server: what the gate keeps out does exist.
        done = subprocess.run(
            ["flwr", "supernode", "list", "run"],
            env=server.variables,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert server.owners is not None
        assert list(server.owners.values()) == ["lab"]
    assert not list(tmp_path.glob("ran-*"))


NODE = """
    import sys
    from fedcmp.federate.engines.flower import launch
    from fedcmp.federate.engines.flower.keys import Keys
    from pathlib import Path

    class Echo:
        def handle(self, request):
            return request

    address, ca, key, patience = sys.argv[1:]
    launch.site(Echo(), Path(key).name, address, Keys(ca=Path(ca), key=Path(key)), float(patience))
"""


@pytest.fixture
def node(keys: Path, tmp_path: Path) -> Iterator[object]:
    """Starts a site without an LLM; returns its log."""
    running: list[subprocess.Popen[bytes]] = []

    def start(address: str, name: str, patience: int) -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / f"{name}.log"
        command = [
            sys.executable,
            "-c",
            textwrap.dedent(NODE),
            address,
            str(keys / "ca.crt"),
            str(keys / name),
        ]
        with log.open("ab") as file:
            process = subprocess.Popen([*command, str(patience)], env=ENVIRONMENT, stdout=file, stderr=file)
        running.append(process)
        return process, log

    yield start
    for process in running:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize(
    "seconds",
    [5, 45, 300],
)
@pytest.mark.skipif("not config.getoption('--slow')")
def test_sites_come_back_after_an_outage(keys: Path, tmp_path: Path, node, seconds: int) -> None:  # type: ignore[no-untyped-def]
    """Flower's own SuperNode stays for ever, connected to nothing, after 20 s."""
    port = free_port()
    files = Keys(certificate=keys / "server.crt", key=keys / "server.key")
    silos = {"lab": keys / "known/lab.pub"}
    log = tmp_path / "lab.log"
    for time_ in range(2):
        home = tmp_path / f"server{time_}"
        home.mkdir()
        with superlink(f"127.0.0.1:{port}", files, silos, home) as server:
            if not time_:
                node(f"127.0.0.1:{port}", "lab", 3600)
            deadline = time.monotonic() + 240
            while log.read_text().count("connected to") <= time_ and time.monotonic() < deadline:
                time.sleep(0.2)
            assert log.read_text().count("connected to") == time_ + 1, log.read_text()
            listed = subprocess.run(
                ["flwr", "supernode", "list", "run", "--format", "json"],
                env=server.variables,
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert '"status": "online"' in listed.stdout, listed.stdout
        if not time_:
            time.sleep(seconds)


SERVER = """
    import sys, time
    from pathlib import Path
    from fedcmp.federate.engines.flower.keys import Keys
    from fedcmp.federate.engines.flower.superlink import superlink

    port, keys, home = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    home.mkdir()
    files = Keys(certificate=keys / "server.crt", key=keys / "server.key")
    with superlink(f"127.0.0.1:{port}", files, {"lab": keys / "known/lab.pub"}, home) as server:
        print("ready", flush=True)
        time.sleep(3600)
"""


def descendants(process: int) -> list[int]:
    """All processes below one."""
    found = []
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.skipif("not config.getoption('--slow')")
@pytest.mark.parametrize(
    "whole", [pytest.param(False, id="the parent alone"), pytest.param(True, id="the whole tree")]
)
def test_sites_come_back_after_a_server_was_killed(keys: Path, tmp_path: Path, node, whole: bool) -> None:  # type: ignore[no-untyped-def]
    """And of the killed one nothing is left."""
    port, log = free_port(), tmp_path / "lab.log"
    for time_ in range(2):
        home = tmp_path / f"server{time_}"
        command = [sys.executable, "-c", textwrap.dedent(SERVER), str(port), str(keys), str(home)]
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            if not time_:
                node(f"127.0.0.1:{port}", "lab", 3600)
            deadline = time.monotonic() + 240
            while log.read_text().count("connected to") <= time_ and time.monotonic() < deadline:
                time.sleep(0.2)
            assert log.read_text().count("connected to") == time_ + 1, log.read_text()
            below = descendants(process.pid)
            assert below
            for each in [process.pid, *(below if whole else ())]:
                os.kill(each, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while any(alive(each) for each in below) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not [each for each in below if alive(each)]


def alive(process: int) -> bool:
    """Whether it runs; what nobody waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_key_that_is_not_known_is_said(keys: Path, tmp_path: Path, node) -> None:  # type: ignore[no-untyped-def]
    port = free_port()
    files = Keys(certificate=keys / "server.crt", key=keys / "server.key")
    home = tmp_path / "server"
    home.mkdir()
    with superlink(f"127.0.0.1:{port}", files, {"lab": keys / "known/lab.pub"}, home):
        process, log = node(f"127.0.0.1:{port}", "stranger", 5)
        until(log, r"does not accept site 'stranger': .*code: 2004. this key is no site's of the study")
        assert process.wait(120) != 0


def test_a_site_runs_no_app_but_its_own(keys: Path, tmp_path: Path, node) -> None:  # type: ignore[no-untyped-def]
    """Not even where it is the server that sends one: the app runs there, and not at the site."""
    port = free_port()
    files = Keys(certificate=keys / "server.crt", key=keys / "server.key")
    home = tmp_path / "server"
    home.mkdir()
    app = foreign_app(tmp_path / "bad", tmp_path)
    with superlink(f"127.0.0.1:{port}", files, {"lab": keys / "known/lab.pub"}, home) as server:
        _, log = node(f"127.0.0.1:{port}", "lab", 3600)
        until(log, "connected to")
        subprocess.run(
            ["flwr", "run", str(app), "run"],
            env=server.variables,
            check=True,
            capture_output=True,
            timeout=240,
        )
        until(tmp_path / "reply", "could not be verified")
        until(
            log, "site lab: refused another app than this version's own: [0-9a-f]{64}, accepted [0-9a-f]{64}"
        )
    assert (tmp_path / "ran-server").exists()
    assert not (tmp_path / "ran-client").exists()


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_behind_an_ordinary_proxy(
    keys: Path, inside: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    """The recipe of docs/sites.md: TLS ends at nginx, keys are still asked for."""
    (recipe,) = documented("nginx")
    outer, inner = free_port(), free_port()
    for old, new in (
        ("listen 443", f"listen 127.0.0.1:{outer}"),
        ("/etc/fedcmp/server", str(keys / "server")),
        ("127.0.0.1:18080", f"127.0.0.1:{inner}"),
    ):
        assert old in recipe
        recipe = recipe.replace(old, new)
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        ("user root; " if os.geteuid() == 0 else "")
        + f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary}\n{recipe}\n}}\n"
    )
    command = [
        "nginx",
        "-e",
        str(tmp_path / "error.log"),
        "-p",
        str(tmp_path),
        "-c",
        str(tmp_path / "nginx.conf"),
    ]
    known = {public_key(keys / "known" / f"{silo}.pub"): silo for silo in SILOS}
    gate = Gate(f"127.0.0.1:{inner}", inside.server_address[1], None, known, None)
    process = subprocess.Popen(command)
    try:
        with gate:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    socket.create_connection(("127.0.0.1", outer), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            body = bytes(6_000_000)
            said = asked(outer, keys, HEARTBEAT, signed(keys, "lab"), body)
            assert said.startswith(b"HTTP/1.1 200"), said[:500]
            assert Inside.came[0][2] == body
            assert asked(outer, keys, HEARTBEAT, signed(keys, "stranger")).startswith(b"HTTP/1.1 400")
            for target in (b"/v1/control/list-runs", b"/v1/fleet/../control/list-runs", b"/docs", b"/"):
                assert asked(outer, keys, target, signed(keys, "lab")).startswith(b"HTTP/1.1 404")
            assert len(Inside.came) == 1
    finally:
        process.terminate()
        process.wait(30)
        gate.close()
