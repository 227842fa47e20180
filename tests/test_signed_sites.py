"""Secure sums whose keys sites have signed, over real processes of Flower."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_flower import PATIENCE, keys, one_thread, start, words  # noqa: F401
from test_sites import SILOS, FakeLink, over, projector, sites_config  # noqa: F401

pytest.importorskip("flwr", reason="needs the extra [flower]")

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.federate.engines.flower.keys import signing
from fedcmp.federate.engines.flower.processes import free_port
from fedcmp.federate.engines.service import Service
from fedcmp.federate.run import run
from fedcmp.pipeline.errors import UserError

SECURE = ["federate.strategy={name='fedcmp',reliability='none'}", "federate.privacy.secure=true"]
SWAPPED = (
    "dropped out of the secure sum: the keys for a secure sum that are said to be of client 'practice' are "
    "not signed with its site's key; give every site the same --site-keys"
)


class Deployment:
    """A server and sites as processes, with TLS and keys; `run` of one round."""

    def __init__(self, config: Path, keys: Path, folder: Path, start: Any) -> None:  # noqa: F811
        self.options = [*SECURE, "federate.rounds=1", f"build={folder}"]
        self.log, self.experiment = folder / "server.log", load(config, [*self.options, "run=real"])
        self._start, self._folder, self._keys, self._config = start, folder, keys, str(config)
        self._words = words(*self.options, "run=real")
        self._address = f"127.0.0.1:{free_port()}"

    def site(self, silo: str, key: str, known: Path) -> subprocess.Popen:
        place = ["--silo", silo, "--superlink", self._address, "--ca", str(self._keys / "ca.crt")]
        place += ["--key", str(self._keys / key), "--site-keys", str(known), "--patience", f"{PATIENCE:g}"]
        started = self._start(self._folder / f"{key}.log", "site", self._config, *self._words, *place)
        assert isinstance(started, subprocess.Popen)
        return started

    def serve(self, known: Path) -> int:
        """Run the server to its end; its exit code."""
        place = ["--engine", "flower", "--address", self._address, "--site-keys", str(known)]
        place += ["--certificate", str(self._keys / "server.crt"), "--key", str(self._keys / "server.key")]
        server = self._start(self.log, "federate", self._config, *self._words, *place)
        return int(server.wait(PATIENCE))


@pytest.fixture
def deployment(sites_config: Path, keys: Path, tmp_path: Path, start: Any) -> Deployment:  # noqa: F811
    return Deployment(sites_config, keys, tmp_path, start)


@pytest.fixture
def swapped(keys: Path, tmp_path: Path) -> Path:  # noqa: F811
    """The sites' keys as a server has them that stands in for one of the sites."""
    folder = tmp_path / "swapped"
    shutil.copytree(keys / "known", folder)
    shutil.copy(keys / "stranger.pub", folder / "practice.pub")
    return folder


@pytest.mark.skipif("not config.getoption('--slow')")
@pytest.mark.usefixtures("one_thread")
def test_signed_sums_over_real_sites(
    deployment: Deployment,
    sites_config: Path,  # noqa: F811
    keys: Path,  # noqa: F811
) -> None:
    """They end in the bytes of the local engine."""
    for silo in SILOS:
        deployment.site(silo, silo, keys / "known")
    assert deployment.serve(keys / "known") == 0, deployment.log.read_text()
    local = load(sites_config, [*deployment.options, "run=local"])
    run(local)
    assert projector(deployment.experiment) == projector(local)


@pytest.mark.skipif("not config.getoption('--slow')")
@pytest.mark.usefixtures("one_thread")
def test_a_server_that_stands_in_for_a_site_over_real_sites(
    deployment: Deployment,
    sites_config: Path,  # noqa: F811
    keys: Path,  # noqa: F811
    swapped: Path,
) -> None:
    """It gets no sum; with the true site the same command ends in equal bytes."""
    impostor = deployment.site("practice", "stranger", swapped)
    for silo in ("clinic", "lab"):
        deployment.site(silo, silo, keys / "known")
    assert deployment.serve(swapped) == 2, deployment.log.read_text()
    impostor.terminate()
    said = deployment.log.read_text()
    assert f"clinic {SWAPPED}" in said
    assert f"lab {SWAPPED}" in said
    assert "Traceback" not in said
    assert not (deployment.experiment.run_path / "projector.safetensors").exists()
    assert impostor.wait(PATIENCE) == 0
    deployment.site("practice", "practice", keys / "known")
    assert deployment.serve(keys / "known") == 0, deployment.log.read_text()
    local = load(sites_config, [*deployment.options, "run=local"])
    run(local)
    assert projector(deployment.experiment) == projector(local)


def test_a_server_that_stands_in_for_a_site(
    sites_config: Path,  # noqa: F811
    keys: Path,  # noqa: F811
    swapped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same without Flower: the others see its keys at *share*, and nothing is masked."""
    experiment = load(sites_config, [*SECURE, "federate.rounds=1", f"build={tmp_path}", "run=fake"])
    steps = []

    class Watched(Service):
        def handle(self, request: dict[str, Any]) -> dict[str, Any]:
            steps.append(request.get("step", {}).get("step"))
            return super().handle(request)

    owned = {"clinic": ("clinic", keys / "known"), "lab": ("lab", keys / "known")}
    owned["practice"] = "stranger", swapped
    sites = {
        node: Watched(experiment, silo, signing(keys / key, known, silo, SILOS))
        for node, (silo, (key, known)) in enumerate(owned.items())
    }
    with pytest.raises(UserError, match=r"needs 3 of 3 clients, and 1 answered 'share' \(practice\)"):
        run(experiment, over(FakeLink(sites)))
    said = capsys.readouterr().out
    assert f"clinic {SWAPPED}" in said
    assert f"lab {SWAPPED}" in said
    assert "mask" not in steps
    assert steps.count("share") == 3


@pytest.mark.parametrize(
    ("key", "known", "complaint"),
    [
        ("practice", ("clinic.pub", "lab.pub"), "no practice.pub; put every site's public key there"),
        ("stranger", ("clinic.pub", "lab.pub", "practice.pub"), "another key than"),
        (
            None,
            ("clinic.pub", "lab.pub", "practice.pub"),
            "a site signs with its own key; give --key as well",
        ),
    ],
)
def test_a_site_whose_key_is_not_in_the_folder(
    sites_config: Path,  # noqa: F811
    keys: Path,  # noqa: F811
    tmp_path: Path,
    key: str | None,
    known: tuple[str, ...],
    complaint: str,
) -> None:
    """It does not begin; one line says why."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in known:
        shutil.copy(keys / "known" / name, folder)
    place = ["--silo", "practice", "--superlink", "127.0.0.1:1", "--ca", str(keys / "ca.crt")]
    place += [] if key is None else ["--key", str(keys / key)]
    done = CliRunner().invoke(
        main, ["site", str(sites_config), *words(*SECURE), *place, "--site-keys", str(folder)]
    )
    assert done.exit_code == 2
    assert complaint in " ".join(done.output.split())
    assert isinstance(done.exception, SystemExit)
