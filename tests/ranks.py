"""`python tests/ranks.py N WORDS...`: `fedcmp WORDS` in N processes, which share one import of torch.

They find each other as torchrun has them do, but nobody ends them when one of them has ended.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch  # noqa: F401
from transformers import AutoModelForCausalLM  # noqa: F401

import fedcmp.evaluate.ranks
import fedcmp.federate.run  # noqa: F401
from fedcmp.cli import run


def rank_of(number: int, count: int, port: int) -> int:
    """A process of that rank; returns its id."""
    child = os.fork()
    if child:
        return child
    Path("/proc/self/comm").write_text(f"rank{number}")
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(count)}
    if "FAULT" in os.environ:
        exec(os.environ["FAULT"])
    run()
    return 0


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = int(sys.argv.pop(1))
    children = [rank_of(number, count, port) for number in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os._exit(max(map(abs, codes)))  # to unload torch takes a second
