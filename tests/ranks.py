"""Processes that find each other as those of torchrun do, forked from one that has imported torch already.

Started by `test_ranks.py`, which writes a line of JSON for each group: its size, the words after `fedcmp`,
code to run before, and the file that it says everything to. Answers are lines, too: process ids, then exit
codes. Nobody ends those that are left when one has ended.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

import torch  # noqa: F401
from transformers import AutoModelForCausalLM  # noqa: F401

import fedcmp.evaluate.ranks
import fedcmp.federate.run  # noqa: F401
from fedcmp.cli import run


def rank_of(number: int, group: dict[str, Any], port: int) -> int:
    """Fork a rank; returns its process id."""
    child = os.fork()
    if child:
        return child
    output = os.open(group["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(group["count"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["fedcmp", *group["words"]]
    exec(group["before"], {"os": os})
    run()
    raise SystemExit


if __name__ == "__main__":
    for line in sys.stdin:
        group = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [rank_of(number, group, port) for number in range(group["count"])]
        print(json.dumps(children), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
