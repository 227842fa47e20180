"""Runs in which clients, texts, images or patients are private: what leaves a site, and what it is worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sites import SILOS, FakeLink, over, projector, sites_config  # noqa: F401
from test_strategies import draw

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.federate.arithmetic.updates import distance
from fedcmp.federate.engines.local import LocalEngine
from fedcmp.federate.engines.service import Service
from fedcmp.federate.engines.wire import job_as_dict, pack, result_of, unpack
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.privacy.accounting import multiplier_of, spent
from fedcmp.federate.privacy.ledger import Ledger
from fedcmp.federate.privacy.noise import privatised
from fedcmp.federate.run import run
from fedcmp.federate.schedule import schedule_of
from fedcmp.federate.server import rounds as server
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.federate.strategies.fedavg import FedAvg
from fedcmp.pipeline.cache import open_cache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.projector import state_of
from fedcmp.pipeline.models.prompts import tokenise_all
from fedcmp.pipeline.privacy import Privacy

TEXTS = ["federate.privacy.unit=text", "federate.privacy.clip=0.05", "federate.privacy.epsilon=4"]
IMAGES = ["federate.privacy.unit=image", *TEXTS[1:]]
PATIENTS = ["federate.privacy.unit=patient", r"federate.privacy.patient=(\d)\.\w+$", *TEXTS[1:]]
CLIENTS = ["federate.privacy.clip=0.1", "federate.privacy.noise_multiplier=2.0"]


@pytest.fixture
def private(sites_config: Path, tmp_path: Path) -> Callable[..., Experiment]:  # noqa: F811
    """Makes experiments with folders and a ledger of their own."""

    def make(*overrides: str) -> Experiment:
        return load(sites_config, [f"build={tmp_path}", f"ledger.path={tmp_path / 'ledger'}", *overrides])

    return make


def test_long_updates_are_shortened_and_short_ones_kept() -> None:
    start, state = draw(0), draw(1)
    norm = distance(state, start)
    short = privatised(start, state, Privacy(clip=norm / 4), 3)
    assert distance(short, start) == pytest.approx(norm / 4, rel=1e-5)
    for name in start:
        assert torch.allclose(short[name] - start[name], (state[name] - start[name]) / 4, atol=1e-6)
    kept = privatised(start, state, Privacy(clip=2 * norm), 3)
    assert all(torch.allclose(kept[name], state[name], atol=1e-6) for name in state)


def test_the_noise_of_all_clients_adds_up_to_the_multiplier() -> None:
    start = {"w": torch.zeros(200, 100)}
    options = Privacy(clip=0.5, noise_multiplier=3.0)
    noises = [privatised(start, start, options, 4)["w"] for _ in range(4)]
    assert sum(noises).std() == pytest.approx(1.5, rel=0.03)  # type: ignore[attr-defined]
    assert not torch.equal(noises[0], noises[1])


def test_noise_that_rounding_would_swallow_is_refused() -> None:
    start = {"w": torch.full((3, 3), 0.9)}
    moved = {"w": start["w"] + 1e-9}
    with pytest.raises(
        UserError, match=r"noise of 1\.0e-07 would be lost in the rounding .* in w; raise clip"
    ):
        privatised(start, moved, Privacy(clip=1e-7, noise_multiplier=2.0), 4)
    privatised(start, moved, Privacy(clip=1e-5, noise_multiplier=2.0), 4)
    privatised(start, moved, Privacy(clip=1e-7), 4)


def history_of(experiment: Experiment) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (experiment.run_path / "history.jsonl").read_text().splitlines()]


def whole_rows(experiment: Experiment) -> list[dict[str, Any]]:
    return [row for row in history_of(experiment) if row["client"] is None]


@pytest.mark.parametrize("secure", ["false", "true"])
def test_a_run_of_private_clients_tells_what_it_has_spent(
    private: Callable[..., Experiment], secure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*CLIENTS, f"federate.privacy.secure={secure}"]
    once, again = (private(*options, f"run={name}") for name in ("once", "again"))
    run(once)
    assert f"round 3: epsilon = {spent([2.0] * 3, 1e-5):.2f} at delta = 1e-05" in capsys.readouterr().out
    told = [row["epsilon"] for row in whole_rows(once)]
    assert told == pytest.approx([spent([2.0] * rounds, 1e-5) for rounds in (1, 2, 3)])
    run(again)
    assert projector(once) != projector(again)


def test_an_epsilon_can_be_asked_for(private: Callable[..., Experiment]) -> None:
    experiment = private("federate.privacy.clip=0.1", "federate.privacy.epsilon=6")
    run(experiment)
    assert whole_rows(experiment)[-1]["epsilon"] == pytest.approx(6)


def test_missing_noise_is_accounted_for(private: Callable[..., Experiment]) -> None:
    """Two of three clients bring two thirds of the noise's variance."""
    experiment = private(*CLIENTS, "sites.quorum=2", "sites.round_timeout=1", "federate.rounds=1")
    link = FakeLink({node: Service(experiment, silo) for node, silo in enumerate(SILOS)})
    link.mute = {2: 1e9}
    run(experiment, over(link))
    (row,) = whole_rows(experiment)
    assert row["missing"] == ["practice"]
    assert row["epsilon"] == pytest.approx(spent([2.0 * sqrt(2 / 3)], 1e-5))


def test_clipped_clients_count_alike(private: Callable[..., Experiment]) -> None:
    experiment = private("federate.privacy.clip=0.1")
    run(experiment)
    weights = [row["weight"] for row in history_of(experiment) if row["client"]]
    assert weights == pytest.approx([1 / 3] * 9)


@pytest.mark.parametrize(
    "options",
    [
        ["federate.strategy.name=fedavg"],
        ["federate.strategy.name=fedcmp"],
        ["federate.strategy.name=fedprox", "federate.strategy.proximal=0.1"],
        ["federate.strategy.name=scaffold", "federate.optimizer.carry=true"],
        ["federate.strategy.name=feddyn"],
        ["federate.strategy.name=fednova"],
        ["federate.strategy.name=muon"],
        ["federate.strategy.name=fedyogi"],
        ["federate.strategy.name=ties"],
        ["federate.strategy.name=local_only"],
        ["federate.strategy.name=centralised"],
        ["federate.strategy.name=fedavg", "federate.privacy.secure=true"],
        [
            "federate.strategy.reliability=none",
            "federate.strategy.name=fedcmp",
            "federate.privacy.secure=true",
        ],
        ["federate.strategy.name=fedavg", "federate.communication.payload=int8"],
        ["federate.strategy.name=fedavg", "federate.together=2", "federate.clients_per_round=2"],
        [
            "federate.strategy.name=fedavg",
            "federate.projector.name=resampler",
            "federate.projector.queries=3",
        ],
    ],
    ids=lambda options: "-".join(option.rpartition("=")[2] for option in options),
)
def test_texts_are_private_under_every_strategy(
    private: Callable[..., Experiment], options: list[str]
) -> None:
    """One pass is one release, however many rounds it has; nothing without noise is in the history."""
    experiment = private(*TEXTS, *options)
    run(experiment)
    rows = history_of(experiment)
    assert len({row["round"] for row in rows}) == 3
    for row in rows:
        assert row["epsilon"] == pytest.approx(4)
        assert row["loss"] is row["tokens"] is row["seconds"] is None
    run(experiment)


@pytest.mark.parametrize("options", [TEXTS, IMAGES, PATIENTS], ids=["text", "image", "patient"])
def test_private_runs_over_sites(private: Callable[..., Experiment], options: list[str]) -> None:
    experiment = private(*options, "sites.join_timeout=1")
    run(experiment, over(FakeLink({n: Service(experiment, silo) for n, silo in enumerate(SILOS)})))
    assert [row["epsilon"] for row in whole_rows(experiment)] == pytest.approx([4] * 3)


def test_noise_is_drawn_anew_for_every_run(private: Callable[..., Experiment]) -> None:
    once, again = (private(*TEXTS, f"run={name}") for name in ("once", "again"))
    run(once)
    run(again)
    assert projector(once) != projector(again)


def test_private_results_are_not_remembered(private: Callable[..., Experiment], tmp_path: Path) -> None:
    for options in (TEXTS, CLIENTS):
        experiment = private(*options, f"memo.path={tmp_path / 'memo'}", f"run=n{len(options)}")
        run(experiment)
        assert not (tmp_path / "memo").exists()


def asked(experiment: Experiment, silo: str = "clinic", **changes: Any) -> LocalResult:
    """What a site sends, through the bytes that travel."""
    service = Service(experiment, silo)
    start = state_of(service._site._trainer.model.projector)
    job = replace(Job(silo, {name: 0.01 + 0 * old for name, old in start.items()}, 0, 0, 3), **changes)
    return answered(service, job)


def answered(service: Service, job: Job) -> LocalResult:
    request = {"kind": "train", "silo": service.silo, "terms": service._terms, "job": job_as_dict(job)}
    return result_of(unpack(pack(service.handle(unpack(pack(request)))))["result"])


ALL_WANTED = frozenset({"gradient", "alignment"})
PUBLIC = {"client", "samples", "steps", "recalled", "releases"}
NOISED = {"state", "gradient", "optimizer", "sent"}


@pytest.mark.parametrize(
    ("options", "noised"),
    [
        (CLIENTS, {"state"}),
        (TEXTS, {"state", "gradient"}),
        (IMAGES, {"state", "gradient"}),
        (PATIENTS, {"state", "gradient"}),
        ([*TEXTS, "federate.optimizer.carry=true"], {"state", "gradient", "optimizer"}),
        ([*TEXTS, "federate.communication.payload=int8"], {"sent", "gradient"}),
        ([*TEXTS, "federate.privacy.secure=true"], set()),
        ([*PATIENTS, "federate.privacy.secure=true"], set()),
        ([*CLIENTS, "federate.privacy.secure=true"], set()),
    ],
    ids=[
        "client",
        "text",
        "image",
        "patient",
        "carry",
        "int8",
        "text-secure",
        "patient-secure",
        "client-secure",
    ],
)
def test_all_that_leaves_a_private_site(
    private: Callable[..., Experiment],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    noised: set[str],
) -> None:
    """By type, and by content: other texts with the same public numbers change nothing but what has noise.

    With the noise held still, what has noise is different for other texts, so it does depend on them.
    """
    from fedcmp.federate.client.stream import Stream

    still = torch.Generator()
    deviations: list[torch.Tensor] = []

    def held(shape: Any) -> torch.Tensor:
        deviations.append(torch.randn(tuple(shape), generator=still, dtype=torch.float64))
        return deviations[-1]

    experiment = private(*options)
    known = {field.name for field in fields(LocalResult)}
    assert known == PUBLIC | NOISED | {"loss", "tokens", "flops", "seconds", "alignment"}
    usual, described = asked(experiment, wants=ALL_WANTED), []
    again = asked(experiment, wants=ALL_WANTED)
    texts = Stream._tokens
    for wrong in (False, True):
        for place in ("steps", "noise"):
            monkeypatch.setattr(f"fedcmp.federate.privacy.{place}.standard_normal", held)
        still.manual_seed(0)
        if wrong:
            monkeypatch.setattr(Stream, "_tokens", lambda self, samples: texts(self, samples[::-1]))
            monkeypatch.setattr(
                "fedcmp.federate.privacy.units.tokenise_all",
                lambda given, *rest, **more: tokenise_all(given[::-1], *rest, **more),
            )
        described.append(asked(experiment, wants=ALL_WANTED))
    for result in (usual, again, *described):
        assert result.loss is result.tokens is result.seconds is result.alignment is result.flops is None
        assert type(result.samples) is type(result.steps) is type(result.releases) is int
        assert result.recalled is False
        assert {name for name in NOISED if getattr(result, name)} == noised
    right, wrong_ = described
    assert [getattr(right, name) for name in ("client", "samples", "steps")] == [
        getattr(wrong_, name) for name in ("client", "samples", "steps")
    ]
    assert [usual.releases, again.releases, right.releases, wrong_.releases] == [1, 2, 3, 4]
    for name in noised:
        ours, theirs = (torch.cat(list(tensors_of(getattr(each, name)))) for each in (usual, again))
        assert (ours != theirs).double().mean() > 0.9 or name == "sent"
        assert not torch.equal(ours, theirs)
        ours, theirs = (torch.cat(list(tensors_of(getattr(each, name)))) for each in described)
        assert not torch.equal(ours, theirs)
    assert deviations


@pytest.mark.parametrize(
    "options", [TEXTS, IMAGES, PATIENTS, CLIENTS], ids=["text", "image", "patient", "client"]
)
def test_a_private_site_introduces_itself_by_public_numbers(
    private: Callable[..., Experiment], options: list[str]
) -> None:
    """And by a name of its cache that says nothing of what is in it, the same after a restart."""
    experiment, cache = private(*options), open_cache(private(), "clinic")
    hello, again = (pack(Service(experiment, "clinic").handle({"kind": "hello"})) for _ in range(2))
    assert hello == again
    assert cache.content not in hello.text
    said = unpack(hello)
    assert said.keys() == {"silo", "card", "terms", "d_llm"}
    public = {"content", "key", "patches", "d_vision", "samples", "left_out", "language"}
    assert said["card"].keys() == public
    assert cache.content in pack(Service(private(), "clinic").handle({"kind": "hello"})).text


def tensors_of(value: Any) -> Any:
    """All floating-point numbers in nested containers, but for the optimiser's count of steps."""
    if isinstance(value, torch.Tensor):
        if value.ndim:
            yield value.double().flatten()
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, list):
        for each in value:
            yield from tensors_of(each)


def test_a_server_that_asks_for_more_than_the_schedule_is_refused(private: Callable[..., Experiment]) -> None:
    experiment = private(*TEXTS)
    for changes in ({"turn": 1}, {"round": 3}, {"round": -1}, {"round": 1}, {"round": 0.0}, {"round": True}):
        with pytest.raises(UserError, match="client 'clinic' refuses"):
            asked(experiment, **changes)
    assert not Ledger(experiment.ledger).releases(open_cache(experiment, "clinic").content)


@pytest.mark.parametrize("options", [TEXTS, PATIENTS, CLIENTS], ids=["text", "patient", "client"])
def test_a_round_that_is_done_again_is_a_further_release(
    private: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """A run that dies in the middle of its second round, after its clients have answered."""
    experiment = private(*options)
    counted = server.usable

    def dies(jobs: list[Job], results: Iterable[Any], *rest: Any) -> Any:
        if jobs[0].round == 1:
            list(results)
            raise KeyboardInterrupt
        return counted(jobs, results, *rest)

    monkeypatch.setattr(server, "usable", dies)
    with pytest.raises(KeyboardInterrupt):
        run(experiment)
    monkeypatch.undo()
    run(experiment)
    told = [row["epsilon"] for row in whole_rows(experiment)]
    m = multiplier_of(4.0, 1e-5)
    expected = [[m], [m] * 2, [m] * 2] if options is not CLIENTS else [[2.0] * n for n in (1, 3, 4)]
    assert told == pytest.approx([spent(each, 1e-5) for each in expected])


def test_a_site_keeps_its_budget_over_runs_and_restarts(private: Callable[..., Experiment]) -> None:
    """Two passes of ε = 4 are one of less than 6; a third is refused by the site, in whatever run."""
    budget = [*TEXTS, "ledger.epsilon=6", "sites.join_timeout=1"]
    for name in "ab":
        experiment = private(*budget, f"run={name}")
        run(experiment, over(FakeLink({n: Service(experiment, silo) for n, silo in enumerate(SILOS)})))
    third = private(*budget, "run=c")
    with pytest.raises(UserError, match=r"epsilon = 7\.\d\d at delta = 1e-05, more than ledger\.epsilon = 6"):
        run(third, over(FakeLink({n: Service(third, silo) for n, silo in enumerate(SILOS)})))
    with pytest.raises(UserError, match=r"silo 'clinic': .* more than ledger\.epsilon = 6"):
        run(private(*budget, "run=d", "seed=7"))
    run(private(*TEXTS, "run=e"))


def test_a_budget_is_for_one_kind_of_patients(private: Callable[..., Experiment]) -> None:
    """What two patterns find may lie across each other, so that releases do not add up."""
    run(private(*PATIENTS, "ledger.epsilon=9", "run=a"))
    run(private(*PATIENTS, "ledger.epsilon=9", "run=b", "federate.privacy.most_texts=1"))
    finer = private(*PATIENTS, "ledger.epsilon=9", "run=c", r"federate.privacy.patient=\d+\.\w+$")
    with pytest.raises(UserError, match=r"releases by patient \(.d\).*and by patient .*which do not add up"):
        run(finer)


@pytest.mark.parametrize("change", [r"federate.privacy.patient=\d\.\w+$", "federate.privacy.most_texts=2"])
def test_the_patient_is_part_of_what_sites_agree_to(private: Callable[..., Experiment], change: str) -> None:
    ours, theirs = private(*PATIENTS), private(*PATIENTS, change)
    services = {n: Service(theirs if n == 1 else ours, silo) for n, silo in enumerate(SILOS)}
    with pytest.raises(UserError, match=f"{change.partition('=')[0]}: "):
        run(private(*PATIENTS, "sites.join_timeout=1"), over(FakeLink(services)))


def test_texts_that_patients_have_too_many_of_are_counted(
    private: Callable[..., Experiment],
) -> None:
    experiment = private(*PATIENTS, "federate.privacy.most_texts=1")
    run(experiment)
    texts = json.loads((experiment.run_path / "manifest.json").read_text())["texts"]
    for silo in SILOS:
        cache = open_cache(experiment, silo)
        rows = [cache.text_image[text] for text in cache.usable_texts("train")]
        patients = {cache.ids[row][-5] for row in rows}
        assert len(patients) < len(rows)
        assert texts[silo] == {"samples": len(patients), "left_out": len(rows) - len(patients)}


def test_one_command_refuses_in_one_line(private: Callable[..., Experiment], sites_config: Path) -> None:  # noqa: F811
    from click.testing import CliRunner

    experiment = private(*TEXTS, "ledger.epsilon=2")
    overrides = [
        f"build={experiment.build}",
        f"ledger.path={experiment.ledger.path}",
        *TEXTS,
        "ledger.epsilon=2",
    ]
    command = ["federate", str(sites_config), *(part for each in overrides for part in ("--set", each))]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "more than ledger.epsilon = 2" in " ".join(result.output.split())


def test_a_machine_with_a_budget_trains_nothing_that_is_not_private(
    private: Callable[..., Experiment],
) -> None:
    for options in ([], ["federate.privacy.clip=0.1"], ["federate.privacy.secure=true"]):
        with pytest.raises(UserError, match=r"ledger\.epsilon = 5: this machine has a budget"):
            Service(private("ledger.epsilon=5", *options), "clinic")


def test_the_ledger_counts_the_noise_that_is_surely_there(private: Callable[..., Experiment]) -> None:
    """Of a client's update the server sees a third of the noise's variance, or a sum with that of most."""
    for secure, share in (("false", 1 / 3), ("true", 1.0)):
        experiment = private(*CLIENTS, f"federate.privacy.secure={secure}", f"run=secure-{secure}")
        run(experiment)
        releases = Ledger(experiment.ledger).releases(open_cache(experiment, "lab").content)[-3:]
        assert [each.noise for each in releases] == pytest.approx([2.0 * sqrt(share)] * 3)
        assert {each.unit for each in releases} == {"client"}


def test_reports_draw_no_losses_of_private_runs(private: Callable[..., Experiment]) -> None:
    from fedcmp.evaluate.report.results import RunResult
    from fedcmp.evaluate.report.training import curves

    experiment = private(*TEXTS)
    run(experiment)
    result = RunResult("private", "fedavg", {}, [], {}, history_of(experiment))
    assert curves([result]) == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["federate.privacy.noise_multiplier=1.0"], "noise_multiplier needs clip"),
        (["federate.privacy.epsilon=1.0"], "epsilon and unit need clip"),
        (["federate.privacy.unit=text"], "epsilon and unit need clip"),
        ([*TEXTS, "federate.privacy.noise_multiplier=1.0"], "say the same thing"),
        (["federate.privacy.unit=person"], "federate.privacy.unit = 'person'"),
        ([*TEXTS, "federate.privacy.unit=patient"], "unit = 'patient' needs patient, a regular expression"),
        ([*PATIENTS, "federate.privacy.patient=p("], "'p\\(' is no regular expression"),
        ([*PATIENTS, r"federate.privacy.patient=(p)(\d)"], "has 2 groups; the patient is one group"),
        ([*PATIENTS, r"federate.privacy.patient=p\d{8}"], "image 'scans/.*png': .* finds no patient in it"),
        ([*PATIENTS, "federate.privacy.unit=text"], "patient and most_texts are for unit = 'patient'"),
        ([*TEXTS, "federate.privacy.most_texts=4"], "patient and most_texts are for unit = 'patient'"),
        ([*PATIENTS, "federate.strategy.name=pivotmerge"], "alignment of features and texts"),
        ([*PATIENTS, "federate.rounds=12"], "patients do not fill its 12 rounds; lower federate.rounds"),
        ([*CLIENTS, "federate.strategy.name=fedcmp"], "looks at more than the mean update"),
        ([*CLIENTS, "federate.strategy.name=scaffold"], "looks at more than the mean update"),
        ([*CLIENTS, "federate.optimizer.carry=true"], "moments that clients carry on"),
        ([*CLIENTS, "federate.communication.payload=int8"], "must not be sent later"),
        ([*TEXTS, "federate.strategy.name=pivotmerge"], "alignment of features and texts"),
        ([*TEXTS, "language.quantize=8bit"], "treats a batch's samples together"),
        ([*TEXTS, "federate.poison.lab.kind=captions"], "swapped captions would be in two samples"),
        (
            [
                "federate.privacy.unit=text",
                "federate.privacy.clip=1",
                "federate.privacy.noise_multiplier=1e-6",
            ],
            "would be lost in the rounding",
        ),
    ],
)
def test_what_would_not_be_private_is_refused(
    private: Callable[..., Experiment], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(private(*overrides))


def test_features_whose_steps_all_pictures_have_set_are_refused(
    private: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedcmp.pipeline.cache import FeatureCache

    monkeypatch.setattr(FeatureCache, "quantiser", object())
    with pytest.raises(UserError, match="int8 features are in steps that all pictures have set together"):
        Service(private(*TEXTS), "clinic")


def test_every_strategy_is_private_or_refused() -> None:
    """Whoever adds a strategy that asks for more has to say what becomes of it."""
    from fedcmp.pipeline.options import Component

    wanted = {name: STRATEGIES.build(Component(name=name), "here").wants for name in STRATEGIES.names()}
    assert set().union(*wanted.values()) == ALL_WANTED
    assert {name for name, wants in wanted.items() if "alignment" in wants} == {"pivotmerge"}


@pytest.mark.parametrize("kept", ["clip=0.1", "secure=true"])
def test_nothing_but_what_was_agreed_leaves_a_client(private: Callable[..., Experiment], kept: str) -> None:
    experiment = private(f"federate.privacy.{kept}")
    here = LocalEngine(experiment, schedule_of(experiment, FedAvg()))
    with here.training(0) as train:
        start = state_of(here._site._trainer.model.projector)  # type: ignore[union-attr]
        (result,) = train([Job("clinic", start, 0, 0, 3, wants=ALL_WANTED)])
    assert result.gradient is result.alignment is result.optimizer is None
