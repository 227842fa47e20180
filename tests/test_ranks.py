"""Training and evaluation over the processes of a real torchrun, on the CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from select import select

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, apart
from safetensors.torch import load_file
from test_sites import sites_config  # noqa: F401

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.evaluate.answers import begin_answers, join_parts, part_path, read_answers
from fedcmp.federate.compatible import refuse_over_ranks
from fedcmp.federate.engines.service import Service
from fedcmp.federate.engines.wire import job_as_dict
from fedcmp.federate.messages import Job
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.hashes import canonical
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.options import Component
from fedcmp.pipeline.ranks import ALONE, Place, place, refuse_ranks

# Three micro-batches a step: two ranks have unequal work, and the last of four has none.
STEPS = ("federate.batch_size=6", "federate.micro_batch=2", "federate.strategy.name=fedcmp")

PATIENCE = 900.0


def words(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


class Ranks:
    """Starts groups of ranks, one after the other, by `ranks.py`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._groups = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/ranks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def start(self, count: int, *command: str, before: str = "") -> list[int]:
        """Process ids by rank."""
        assert self.process.stdin
        self._groups += 1
        output = str(self._folder / f"{self._groups}.txt")
        group = {"count": count, "words": command, "before": before, "output": output}
        self.process.stdin.write(json.dumps(group) + "\n")
        self.process.stdin.flush()
        return self._said()

    def finish(self) -> tuple[list[int], str]:
        """Exit codes by rank, and what all of them said."""
        return self._said(), (self._folder / f"{self._groups}.txt").read_text()

    def _said(self) -> list[int]:
        assert self.process.stdout
        assert select([self.process.stdout], [], [], PATIENCE)[0]
        found: list[int] = json.loads(self.process.stdout.readline())
        return found

    def __call__(self, count: int, *command: str, before: str = "") -> tuple[list[int], str]:
        self.start(count, *command, before=before)
        return self.finish()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.process.kill()
    made.process.communicate()


def torchrun(count: int, *command: str) -> str:
    program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "fedcmp"]
    result = subprocess.run(
        [sys.executable, *program, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def alone(*command: str) -> str:
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return result.output


def rows(config: Path, run: str) -> list[dict]:
    lines = (config.parent / "build/runs/study" / run / "history.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in ("seconds", "recalled")}
        for line in lines
    ]


def projector(config: Path, run: str) -> bytes:
    return (config.parent / "build/runs/study" / run / "projector.safetensors").read_bytes()


def answered(config: Path, run: str) -> dict[str, bytes]:
    """All files of a run's scores, but for its name in them."""
    folder = config.parent / "build/scores/study" / run
    return {
        str(file.relative_to(folder)): file.read_bytes().replace(run.encode(), b"RUN")
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture(scope="module")
def single(extracted: Path) -> Path:
    """The experiment, trained and evaluated by one process as run `one`."""
    config = apart(extracted, "ranks")
    alone("federate", str(config), *words("run=one", *STEPS))
    alone("evaluate", str(config), *words("run=one", *STEPS))
    return config


def test_two_ranks_end_in_the_bytes_of_one(single: Path) -> None:
    output = torchrun(2, "federate", str(single), *words("run=two", *STEPS))
    assert projector(single, "two") == projector(single, "one")
    assert rows(single, "two") == rows(single, "one")
    assert output.count("Projector and history in") == 1
    assert "a step of 3 micro-batches is uneven work for 2 ranks; federate.micro_batch = 3" in output


@pytest.mark.usefixtures("slow")
def test_two_ranks_give_the_answers_of_one(single: Path, ranks: Ranks) -> None:
    alone("federate", str(single), *words("run=judged", *STEPS))
    codes, output = ranks(2, "evaluate", str(single), *words("run=judged", *STEPS))
    assert not any(codes), output
    assert output.count("Scores of judged") == 1
    assert answered(single, "judged") == answered(single, "one")


def killed(ranks: Ranks, started: list[int], rank: int, when: Callable[[], bool]) -> str:
    """Kill a rank once something is so; what all of them have said in the end."""
    deadline = time.monotonic() + PATIENCE
    while not when():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(started[rank], signal.SIGKILL)
    began = time.monotonic()
    codes, output = ranks.finish()
    # Seconds on a machine that is not busy; those that wait for ever would wait for two hours.
    assert time.monotonic() - began < 60
    assert all(codes)
    return output


def test_a_killed_rank_is_named_and_a_rerun_goes_on(single: Path, ranks: Ranks) -> None:
    """With another number of processes: what they share of a step is nobody else's business."""
    more = ("federate.rounds=12", "federate.batch_size=2", "federate.micro_batch=1")
    history = single.parent / "build/runs/study/lost/history.jsonl"
    started = ranks.start(2, "federate", str(single), *words("run=lost", *more))
    output = killed(ranks, started, 1, lambda: history.exists() and history.stat().st_size > 0)
    assert "fedcmp: rank 1 of 2 died; run the same command to go on" in output
    assert "Traceback" not in output
    assert "continuing after round" in alone("federate", str(single), *words("run=lost", *more))
    alone("federate", str(single), *words("run=whole", *more))
    assert projector(single, "lost") == projector(single, "whole")
    assert rows(single, "lost") == rows(single, "whole")


@pytest.fixture
def slow(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--slow"):
        pytest.skip("several processes each")


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("count", [3, 4])
def test_any_number_of_ranks_ends_in_the_bytes_of_one(single: Path, count: int) -> None:
    run = f"of{count}"
    for command in ("federate", "evaluate"):
        torchrun(count, command, str(single), *words(f"run={run}", *STEPS))
    assert projector(single, run) == projector(single, "one")
    assert rows(single, run) == rows(single, "one")
    assert answered(single, run) == answered(single, "one")


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(
    "options",
    [
        ("federate.communication.payload=int8", "federate.optimizer.carry=true"),
        ("federate.strategy.name=pivotmerge",),
        ("federate.strategy.name=centralised",),
        ("federate.checkpointing=true", "federate.strategy.name=scaffold"),
        ("federate.privacy.clip=0.1", "federate.strategy.name=fedavg"),
    ],
)
def test_options_are_the_same_over_ranks(single: Path, ranks: Ranks, options: tuple[str, ...]) -> None:
    name = re.sub(r"\W", "", "".join(options))
    alone("federate", str(single), *words(f"run=a{name}", *STEPS, *options))
    codes, output = ranks(2, "federate", str(single), *words(f"run=b{name}", *STEPS, *options))
    assert not any(codes), output
    assert projector(single, f"a{name}") == projector(single, f"b{name}")
    assert rows(single, f"a{name}") == rows(single, f"b{name}")


@pytest.mark.usefixtures("slow")
def test_what_ranks_have_trained_is_remembered(single: Path, ranks: Ranks, tmp_path: Path) -> None:
    """By any number of processes: the memo knows no ranks."""
    more = words(*STEPS, f"memo.path={tmp_path}/memo")
    codes, output = ranks(2, "federate", str(single), *words("run=first"), *more)
    assert not any(codes), output
    alone("federate", str(single), *words("run=again"), *more)
    codes, output = ranks(2, "federate", str(single), *words("run=third"), *more)
    assert not any(codes), output
    for run in ("again", "third"):
        assert projector(single, run) == projector(single, "one")
        lines = (single.parent / "build/runs/study" / run / "history.jsonl").read_text().splitlines()
        recalled = [json.loads(line)["recalled"] for line in lines if json.loads(line)["client"]]
        assert recalled == [True] * 6


SERVER = """
import fedcmp.federate.engines.flower.launch as launch
from test_ranks import result_of_a_site
launch.site = lambda service, *words: print(result_of_a_site(service))
"""


def result_of_a_site(service: Service) -> str:
    """What a site answers in two rounds, as a hash."""
    hello = service.handle({"kind": "hello"})
    generator = torch.Generator().manual_seed(0)
    projector = projectors.build(Component(name="mlp2x_gelu"), d_vision=24, d_llm=32)
    projectors.initialise(projector, generator)
    state, found = projectors.state_of(projector), []
    for turn in range(2):
        job = job_as_dict(Job("clinic", state, turn, turn, 3))
        asked = {"kind": "train", "silo": "clinic", "terms": hello["terms"], "job": job}
        state = service.handle(asked)["result"]["state"]
        found.append(projectors.content_hash(state))
    return f"site: {found}"


@pytest.mark.usefixtures("slow")
def test_a_site_of_two_ranks_answers_as_one(extracted: Path, ranks: Ranks) -> None:
    pytest.importorskip("flwr", reason="needs the extra [flower]")
    options = ("run=site", "federate.micro_batch=1")
    place = ("--silo", "clinic", "--superlink", "127.0.0.1:1", "--insecure")
    codes, output = ranks(2, "site", str(extracted), *words(*options), *place, before=SERVER)
    assert not any(codes), output
    assert result_of_a_site(Service(load(extracted, options), "clinic")) in output


@pytest.mark.usefixtures("slow")
def test_secure_sums_are_the_same_over_ranks(sites_config: Path, ranks: Ranks, tmp_path: Path) -> None:  # noqa: F811
    builds = [tmp_path / "one", tmp_path / "two"]
    options = [
        words(f"build={build}", "federate.micro_batch=1", "federate.privacy.secure=true") for build in builds
    ]
    alone("federate", str(sites_config), *options[0])
    codes, output = ranks(2, "federate", str(sites_config), *options[1])
    assert not any(codes), output
    one, two = (next(build.glob("runs/*/*/projector.safetensors")).read_bytes() for build in builds)
    assert one == two


@pytest.mark.usefixtures("slow")
def test_all_reduce_is_near_and_of_its_own_identity(single: Path, ranks: Ranks) -> None:
    codes, output = ranks(2, "federate", str(single), *words("run=reduced", *STEPS, "federate.all_reduce=2"))
    assert not any(codes), output
    folder = single.parent / "build/runs/study/reduced"
    assert json.loads((folder / "manifest.json").read_text())["identity"]["federate"]["all_reduce"] == 2
    losses = [[row["loss"] for row in rows(single, name)] for name in ("reduced", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    # It is judged wherever, by any number of processes.
    alone("evaluate", str(single), *words("run=reduced", *STEPS, "federate.all_reduce=2"))


@pytest.mark.usefixtures("slow")
@pytest.mark.skipif(torch.__version__ < (2, 8), reason="fully_shard wants a GPU")
@pytest.mark.parametrize("more", [(), ("federate.checkpointing=true", "federate.all_reduce=2")])
def test_a_sharded_llm_teaches_the_same(single: Path, ranks: Ranks, more: tuple[str, ...]) -> None:
    """Three micro-batches on two ranks: one of these has none in every other turn, and goes along."""
    run = f"sharded{len(more)}"
    codes, output = ranks(
        2, "federate", str(single), *words(f"run={run}", *STEPS, "federate.shard=true", *more)
    )
    assert not any(codes), output
    losses = [[row["loss"] for row in rows(single, name)] for name in (run, "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if more else 1e-6)
    if not more:
        states = [
            load_file(single.parent / f"build/runs/study/{name}/projector.safetensors")
            for name in (run, "one")
        ]
        for name, tensor in states[0].items():
            torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-5)


FAULT = """
from fedcmp.federate.client.trainer import Trainer
train = Trainer.train
def failing(self, jobs):
    if os.environ["RANK"] == "{rank}" and jobs[0].round == 1:
        {fault}
    return train(self, jobs)
Trainer.train = failing
"""


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(
    ("rank", "fault", "message"),
    [
        (1, "raise RuntimeError('out of memory')", "rank 1 of 3 failed: out of memory"),
        (0, "raise RuntimeError('out of memory')", "rank 0 of 3 failed: out of memory"),
        (2, "raise MemoryError('no more')", "rank 2 of 3 failed: no more"),
        (2, "os._exit(9)", "rank 2 of 3 died"),
        (0, "os._exit(9)", "rank 0 of 3 died"),
        (1, "jobs[0].start['linear_1.bias'].add_(1e-7)", "has trained another projector than rank 0"),
    ],
)
def test_whoever_fails_is_named_and_nobody_waits(
    single: Path, ranks: Ranks, tmp_path: Path, rank: int, fault: str, message: str
) -> None:
    more = words("run=fails", *STEPS, f"build={tmp_path}/build")
    codes, output = ranks(3, "federate", str(single), *more, before=FAULT.format(rank=rank, fault=fault))
    assert any(codes)
    assert message in output
    alone("federate", str(single), *more)
    assert (tmp_path / "build/runs/study/fails/projector.safetensors").read_bytes() == projector(
        single, "one"
    )


@pytest.mark.usefixtures("slow")
def test_what_diverges_says_so_once(single: Path, ranks: Ranks) -> None:
    more = ("run=wild", "federate.optimizer.learning_rate=1e38", "federate.optimizer.name=sgd")
    codes, output = ranks(2, "federate", str(single), *words(*STEPS, *more))
    assert any(codes)
    assert output.count("lower federate.optimizer.learning_rate") == 1
    assert "rank 1" not in output


@pytest.mark.usefixtures("slow")
def test_a_run_that_is_done_ends_all_ranks(single: Path, ranks: Ranks) -> None:
    codes, output = ranks(2, "federate", str(single), *words("run=one", *STEPS))
    assert not any(codes)
    assert output.count("nothing to do") == 1


@pytest.mark.usefixtures("slow")
def test_a_killed_rank_of_an_evaluation_and_a_rerun(single: Path, ranks: Ranks) -> None:
    more = words("run=cut", *STEPS, "evaluate.batch_size=1")
    whole = words("run=uncut", *STEPS, "evaluate.batch_size=1")
    for run in ("cut", "uncut"):
        alone("federate", str(single), *words(f"run={run}", *STEPS))
    answers = single.parent / "build/scores/study/cut/answers"
    started = ranks.start(2, "evaluate", str(single), *more)
    output = killed(
        ranks, started, 1, lambda: any(part.stat().st_size > 900 for part in answers.glob("*.part1"))
    )
    assert "rank 1 of 2 died" in output
    assert list(answers.glob("*.part*"))
    alone("evaluate", str(single), *more)
    assert not list(answers.glob("*.part*"))
    alone("evaluate", str(single), *whole)
    assert {n: b for n, b in answered(single, "cut").items() if n.endswith(".json")} == {
        n: b for n, b in answered(single, "uncut").items() if n.endswith(".json")
    }


def test_parts_are_read_and_joined_in_the_order_of_their_batches(tmp_path: Path) -> None:
    path, model = tmp_path / "projector.jsonl", {"projector": "a"}

    def line(key: str) -> bytes:
        return canonical({"key": key, "benchmark": "b", "id": key, "image": "i", "answer": key.upper()})

    begin_answers(path, model)
    with path.open("ab") as file:
        file.write(line("a") + b"\n")
    for rank in range(3):
        part = part_path(path, rank)
        begin_answers(part, model)
        with part.open("ab") as file:
            for batch in range(rank, 7, 3):
                for each in "xy":
                    entry = json.loads(line(f"{batch}{each}")) | {"batch": batch}
                    file.write(canonical(entry) + b"\n")
            file.write(b'{"key": "torn')
    assert len(read_answers(path, model).answers) == 15
    before = {each: each.read_bytes() for each in tmp_path.iterdir()}
    join_parts(path, model)
    expected = [line(f"{batch}{each}") for batch in range(7) for each in "xy"]
    assert path.read_bytes().split(b"\n")[1:-1] == [line("a"), *expected]
    assert list(tmp_path.iterdir()) == [path]
    # Killed before the parts were removed: nothing is there twice.
    whole = path.read_bytes()
    for each, content in before.items():
        if each != path:
            each.write_bytes(content)
    begin_answers(path, model)
    assert path.read_bytes() == whole
    with pytest.raises(UserError, match="of another projector"):
        read_answers(path, {"projector": "b"})


@pytest.mark.parametrize(
    ("variables", "found"),
    [({}, ALONE), ({"RANK": "2", "WORLD_SIZE": "4"}, Place(2, 4)), ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE)],
)
def test_places(variables: dict[str, str], found: Place) -> None:
    assert place(variables) == found


@pytest.mark.parametrize("variables", [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "x"}, {"WORLD_SIZE": "-1"}])
def test_unfit_places_are_named(variables: dict[str, str]) -> None:
    with pytest.raises(UserError, match="no such rank"):
        place(variables)


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        (("federate.together=2",), 2, "federate.together = 2: torchrun has started 2 processes"),
        (("federate.all_reduce=4",), 2, "and there are 2; start it with torchrun --nproc-per-node 4"),
        (("federate.all_reduce=4",), 1, "and there is one"),
        (("language.device_map=auto",), 2, "language.device_map = 'auto'"),
        (("federate.shard=true",), 1, "and there is one; start it with torchrun"),
        (("federate.shard=true", "federate.compile=true"), 2, "does not go with federate.compile"),
        (
            ("federate.privacy.clip=1", "federate.privacy.noise_multiplier=1", "federate.privacy.unit=image"),
            2,
            "federate.privacy.unit = 'image'",
        ),
    ],
)
def test_what_ranks_cannot_do_is_refused(
    extracted: Path, options: tuple[str, ...], count: int, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        refuse_over_ranks(load(extracted, options), count)


def test_engines_of_one_process_are_refused(
    extracted: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="--engine flower: is one process, and torchrun has started 2"):
        refuse_ranks("--engine flower")
    result = CliRunner().invoke(main, ["federate", str(extracted), "--engine", "simulation"])
    assert result.exit_code == 2
    assert "start it without torchrun" in result.output
    result = CliRunner().invoke(main, ["federate", str(extracted)])
    assert (result.exit_code, "MASTER_ADDR is missing" in result.output) == (2, True)
