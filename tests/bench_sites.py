"""What a round over real sites costs besides training: `python tests/bench_sites.py`.

Two sites on loopback answer with what they were sent, of the size of a projector. `flower` is Flower's
own floor: a client app that answers itself, waited for with `Grid.send_and_receive`. `fedcmp` relays to
the site's daemon, packs and unpacks, and looks for answers more often.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SIZES = (1, 40, 100)
ROUNDS = 4
SITES = 2

APP = """
import json, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from fedcmp.federate.engines.flower import link as flower

client_app = ClientApp()

@client_app.query()
def echo(message, context):
    return Message(message.content, reply_to=message)

@client_app.train()
def relay(message, context):
    parts = flower.relay(flower._parts(message.content), context, 600)
    return Message(flower._content(*parts), reply_to=message)

server_app = ServerApp()

@server_app.main()
def main(grid, context):
    import torch
    from fedcmp.federate.engines.wire import pack, unpack
    link, out = flower.FlowerLink(grid), {}
    while len(link.nodes()) < SITES:
        time.sleep(0.2)
    nodes = sorted(link.nodes())
    for size in SIZES_:
        state = {"w": torch.randn(size * 250_000)}
        for kind in ("flower", "fedcmp"):
            seconds = []
            for round_ in range(ROUNDS):
                state["w"][0] = round_
                began = time.monotonic()
                payload = pack({"state": state})
                if kind == "flower":
                    content = flower._content(payload.text, payload.tensors)
                    messages = [Message(content, dst_node_id=n, message_type="query") for n in nodes]
                    assert len(list(grid.send_and_receive(messages, timeout=300))) == len(nodes)
                else:
                    waiting = {link.send(n, "train", payload, 300) for n in nodes}
                    while waiting:
                        for name, answer in link.receive(waiting).items():
                            unpack(answer)
                            waiting.discard(name)
                        time.sleep(0.2)
                seconds.append(time.monotonic() - began)
            out[f"{kind} {size}"] = seconds
            Path(str(context.run_config["out"])).write_text(json.dumps(out))
"""


class Echo:
    """Answers with what it was asked, unpacked and packed as real answers are."""

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        return request


def site(name: str, address: str) -> None:
    from fedcmp.federate.engines.flower import launch
    from fedcmp.federate.engines.flower.keys import Keys

    launch._SUPERNODE = ("flower-supernode",)  # ours would refuse the benchmark's app
    launch.site(Echo(), name, address, Keys(insecure=True), 300)  # type: ignore[arg-type]


def main() -> None:
    from fedcmp.federate.engines.flower.processes import Child, environment, free_port, wait_for_port
    from fedcmp.pipeline.console import table

    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder:
        home, app = Path(folder), Path(folder) / "app"
        app.mkdir()
        code = APP.replace("SIZES_", repr(SIZES)).replace("ROUNDS", str(ROUNDS)).replace("SITES", str(SITES))
        (app / "bench.py").write_text(code)
        toml = (ROOT / "federate/engines/flower/app/pyproject.toml").read_text()
        toml = toml.replace("fedcmp.federate.engines.flower.link", "bench").replace('config = ""', 'out = ""')
        (app / "pyproject.toml").write_text(toml)
        (home / "config.toml").write_text(f'[superlink.run]\naddress = "{address}"\ninsecure = true\n')
        variables = environment(home)
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", address.split(":")[1]]
        superlink = Child([*command, "--disable-runtime-dependency-installation"], variables)
        wait_for_port(address, superlink, 60)
        sites = [
            subprocess.Popen([sys.executable, __file__, f"site{n}", address], stdout=subprocess.DEVNULL)
            for n in range(SITES)
        ]
        out = home / "out.json"
        run = Child(["flwr", "run", str(app), "run", "--stream", "--run-config", f'out="{out}"'], variables)
        deadline = time.monotonic() + 540
        while time.monotonic() < deadline and not run.ended():
            time.sleep(0.5)
        print("\n".join(run.new_lines()[-5:]))
        run.stop()
        for process in sites:
            process.terminate()
        for process in sites:
            process.wait()
        superlink.stop()
        results = json.loads(out.read_text())
    rows = [[name, f"{min(each):.1f}", " ".join(f"{s:.1f}" for s in each)] for name, each in results.items()]
    table("Seconds a round without training", ["engine, MB", "best", "all"], rows)


if __name__ == "__main__":
    site(*sys.argv[1:]) if len(sys.argv) > 1 else main()
