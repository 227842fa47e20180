"""Sources and caches on S3: moto's server on loopback."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import digest, picture, write_llava, write_shard
from test_parquet import inline, saved, write

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.extract.sources.base import Skipped
from fedcmp.extract.sources.image_folder import ImageFolder
from fedcmp.extract.sources.llava_json import LlavaJson
from fedcmp.extract.sources.parquet import Parquet
from fedcmp.extract.sources.webdataset import WebDataset
from fedcmp.pipeline.cache import FeatureCache, mirror, open_cache
from fedcmp.pipeline.cache.mirror import pull, push
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.remote import Remote

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "FEDCMP_CACHE": str(tmp_path / "mirrors"),
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = "b" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:20]
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


def upload(folder: Path, url: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            (Remote(url) / str(file.relative_to(folder))).send(file)


def facts(records: Any) -> list[Any]:
    return [
        item.reason if isinstance(item, Skipped) else (item.id, item.texts, item.read_image())
        for item in records
    ]


def test_sources_on_s3_give_what_local_ones_give(tmp_path: Path, bucket: str) -> None:
    write_llava(tmp_path / "d", 5)
    for number in range(3):
        samples = [{"__key__": f"{number}{n}", "png": picture(n), "txt": b"words"} for n in range(3)]
        write_shard(tmp_path / "d" / f"t-{number}.tar", samples)
    (tmp_path / "d/captions.csv").write_text("image,caption\nscans/002.png,a dog\nscans/002.png,a cat\n")
    (tmp_path / "d/scans/001.txt").write_text("beside")
    names = ["a.png", "b.png", "a.png"]
    columns = {"image": inline(names, [picture(0), picture(1), picture(0)]), "text": ["x", "y", "z"]}
    write(tmp_path / "d/0.parquet", columns)
    saved(tmp_path / "d/saved", ["data-00000-of-00001.arrow"])
    upload(tmp_path / "d", f"{bucket}/d")
    url, local = f"{bucket}/d", tmp_path / "d"
    for there, here in (
        (LlavaJson(path=f"{url}/pairs.json", images=url), LlavaJson(path=local / "pairs.json", images=local)),
        (WebDataset(path=f"{url}/t-*.tar"), WebDataset(path=f"{local}/t-*.tar")),
        (WebDataset(path=f"{url}/t-{{0..2}}.tar"), WebDataset(path=f"{local}/t-*.tar")),
        (
            ImageFolder(path=url, captions=f"{url}/captions.csv"),
            ImageFolder(path=local, captions=local / "captions.csv"),
        ),
        (ImageFolder(path=f"{url}/scans"), ImageFolder(path=local / "scans")),
        (Parquet(path=f"{url}/*.parquet"), Parquet(path=f"{local}/*.parquet")),
        (Parquet(path=f"{url}/saved"), Parquet(path=f"{local}/saved")),
    ):
        assert facts(there.records()) == facts(here.records())
        assert len(facts(there.records())) in (1, 2, 5, 9)


def test_identity_follows_the_objects(tmp_path: Path, bucket: str) -> None:
    write_llava(tmp_path / "d", 3)
    write_shard(tmp_path / "d/0.tar", [{"__key__": "a", "png": picture(0)}])
    write(tmp_path / "d/0.parquet", {"image": ["scans/001.png"], "text": ["words"]})
    upload(tmp_path / "d", f"{bucket}/d")

    def identities() -> list[str]:
        sources = (
            LlavaJson(path=f"{bucket}/d/pairs.json", images=f"{bucket}/d"),
            WebDataset(path=f"{bucket}/d/*.tar"),
            Parquet(path=f"{bucket}/d", images=f"{bucket}/d"),
        )
        return [json.dumps(source.identity()) for source in sources]

    before = identities()
    upload(tmp_path / "d", f"{bucket}/d")
    assert identities() == before
    (tmp_path / "new").write_bytes(picture(7))
    (Remote(bucket) / "d/scans/001.png").send(tmp_path / "new")
    write_shard(tmp_path / "new.tar", [{"__key__": "a", "png": picture(1)}])
    (Remote(bucket) / "d/0.tar").send(tmp_path / "new.tar")
    assert all(old != new for old, new in zip(before, identities(), strict=True))


def test_missing_objects_and_lost_connections_differ(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llava(tmp_path / "d", 2)
    upload(tmp_path / "d", f"{bucket}/d")
    source = LlavaJson(path=f"{bucket}/d/pairs.json", images=f"{bucket}/d")
    records = list(source.records())
    (Remote(bucket) / "d/scans/001.png").delete()
    with pytest.raises(FileNotFoundError):
        records[1].read_image()
    with pytest.raises(UserError, match="no such file; set 'path'"):
        list(LlavaJson(path=f"{bucket}/none.json", images=bucket).records())
    with pytest.raises(UserError, match="no such shard"):
        list(WebDataset(path=f"{bucket}/none-*.tar").records())
    with pytest.raises(UserError, match="no such shard"):
        list(Parquet(path=f"{bucket}/none").records_here())
    with pytest.raises(UserError, match="cannot be reached"):
        Remote("nonsense://x/y").read_bytes()

    write_shard(tmp_path / "0.tar", [{"__key__": f"{n}", "png": picture(n)} for n in range(3)])
    (Remote(bucket) / "0.tar").send(tmp_path / "0.tar")
    table = write(tmp_path / "0.parquet", {"image": inline(["a"]), "text": ["words"]})
    (Remote(bucket) / "0.parquet").send(table)

    def lost(*_: object) -> bytes:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr("fsspec.spec.AbstractBufferedFile.read", lost)
    with pytest.raises(UserError, match=r"0\.tar: reading it stopped: reset by peer; run again"):
        list(WebDataset(path=f"{bucket}/0.tar").records())
    with pytest.raises(UserError, match=r"0\.parquet: reading it stopped: reset by peer; run again"):
        list(Parquet(path=f"{bucket}/0.parquet").records_here())


def experiment(root: Path, clip_dir: Path, llama_dir: Path, data: Path, features: str) -> Path:
    path = root / "cloud.toml"
    path.write_text(
        f'experiment = "cloud"\nfeatures = "{features}"\nbuild = "{root}/build"\n'
        '[extract]\nshard_images = 4\nbatch_size = 3\n[extract.encoder]\nname = "transformers"\n'
        f'path = "{clip_dir}"\n[extract.silos]\n'
        f'one = {{ name = "llava_json", path = "{data}/pairs.json", images = "{data}" }}\n'
        f'[language]\npath = "{llama_dir}"\n[federate]\nsilos = ["one"]\nrounds = 1\nbatch_size = 4\n'
    )
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def cloud(tmp_path: Path, clip_dir: Path, llama_dir: Path, bucket: str) -> Path:
    """An experiment whose caches lie on S3, extracted."""
    write_llava(tmp_path / "d", 10)
    path = experiment(tmp_path, clip_dir, llama_dir, tmp_path / "d", f"{bucket}/features")
    result = run("extract", path)
    assert result.exit_code == 0, result.output
    assert "sent" in result.output
    return path


def there(loaded: Experiment) -> Remote:
    assert loaded.store is not None
    return Remote(loaded.store) / "one.zarr"


def test_caches_on_s3_are_kept_in_step(cloud: Path, tmp_path: Path) -> None:
    loaded = load(cloud)
    assert loaded.features.parent == tmp_path / "mirrors"
    local = loaded.cache_path("one")
    names = {str(file.relative_to(local)) for file in local.rglob("*") if file.is_file()}
    assert set(there(loaded).listing()) == names
    again = run("extract", cloud)
    assert "Nothing to do" in again.output
    assert "sent" not in again.output
    whole = digest(local)
    shutil.rmtree(tmp_path / "mirrors")
    fetched = run("extract", cloud)
    assert "fetched" in fetched.output
    assert "Nothing to do" in fetched.output
    assert digest(local) == whole
    shutil.rmtree(tmp_path / "mirrors")
    trained = run("federate", cloud)
    assert trained.exit_code == 0, trained.output
    assert digest(local) == whole


def test_new_images_reach_s3_and_its_readers(cloud: Path, tmp_path: Path) -> None:
    loaded = load(cloud)
    write_llava(tmp_path / "d", 6)
    assert run("extract", cloud).exit_code == 0
    shutil.rmtree(tmp_path / "mirrors")
    assert open_cache(loaded, "one").images == 6
    local = loaded.cache_path("one")
    assert len(there(loaded).listing()) == len([file for file in local.rglob("*") if file.is_file()])


def test_what_was_not_sent_yet_is_not_replaced_by_older(
    cloud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(cloud)
    write_llava(tmp_path / "d", 14)
    with monkeypatch.context() as patched:
        patched.setattr("fedcmp.extract.run.push", lambda *_: (_ for _ in ()).throw(UserError("no network")))
        assert run("extract", cloud).exit_code == 2
    newer = digest(loaded.cache_path("one"))
    refused = run("federate", cloud)
    assert refused.exit_code == 2
    assert "not yet sent to" in refused.output
    assert digest(loaded.cache_path("one")) == newer
    assert "sent" in run("extract", cloud).output
    assert there(loaded).listing().keys() >= {"manifest.json"}
    assert run("federate", cloud).exit_code == 0
    assert digest(loaded.cache_path("one")) == newer


def test_a_cache_of_another_encoder_on_s3_is_not_overwritten(cloud: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "mirrors")
    refused = run("extract", cloud, "--set", "extract.encoder.layer=-1")
    assert refused.exit_code == 2
    assert "encoder.layer: -1 here, -2 there" in refused.output
    assert run("extract", cloud, "--set", "extract.encoder.layer=-1", "--overwrite").exit_code == 0
    shutil.rmtree(tmp_path / "mirrors")
    assert open_cache(load(cloud), "one").manifest["key"]["encoder"]["layer"] == -1


def test_damage_on_s3_is_found(cloud: Path, tmp_path: Path) -> None:
    loaded = load(cloud)
    name = "features/patch/c/1/0/0"
    data = bytearray((loaded.cache_path("one") / name).read_bytes())
    data[5] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    (there(loaded) / name).send(tmp_path / "damaged")
    shutil.rmtree(tmp_path / "mirrors")
    with pytest.raises(UserError, match=r"c/1/0/0: its SHA-256 is not the manifest's"):
        open_cache(loaded, "one")
    (there(loaded) / name).delete()
    with pytest.raises(UserError, match="missing or not"):
        open_cache(loaded, "one")
    assert not loaded.cache_path("one").exists()


@pytest.mark.parametrize("name", ["../../evil", "/evil", "a/../../evil", "manifest.json", "a\\b", ""])
def test_a_manifest_that_reaches_out_is_refused(tmp_path: Path, bucket: str, name: str) -> None:
    manifest = {"files": {name: [1, "0" * 64]}}
    (tmp_path / "manifest").write_text(json.dumps(manifest))
    (Remote(bucket) / "one.zarr/manifest.json").send(tmp_path / "manifest")
    with pytest.raises(UserError, match="which no cache has"):
        pull(Remote(bucket) / "one.zarr", tmp_path / "copy.zarr")
    assert not (tmp_path / "copy.zarr").exists()


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_killed_transfer_goes_on(
    cloud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    loaded = load(cloud)
    local, place = loaded.cache_path("one"), Remote(f"{loaded.store}/copy.zarr")
    method, transfer = ("send", lambda: push(local, place))
    if direction == "pull":
        push(local, place)
        method, transfer = ("fetch", lambda: pull(place, tmp_path / "copy.zarr"))
    real, moved = getattr(Remote, method), []

    def killed(self: Remote, path: Path) -> None:
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(self.url)
        real(self, path)

    monkeypatch.setattr(Remote, method, killed)
    with pytest.raises(KeyboardInterrupt):
        transfer()
    assert mirror.remote_manifest(place) is None or direction == "pull"
    assert not (tmp_path / "copy.zarr").exists()
    first = list(moved)

    def counted(self: Remote, path: Path) -> None:
        moved.append(self.url)
        real(self, path)

    monkeypatch.setattr(Remote, method, counted)
    assert transfer()
    assert not set(moved[3:]) & set(first)
    assert not transfer()
    pull(place, tmp_path / "copy.zarr")
    assert digest(tmp_path / "copy.zarr") == digest(local)
    assert FeatureCache(tmp_path / "copy.zarr").images == 10


def test_store_is_a_url(cloud: Path) -> None:
    with pytest.raises(UserError, match=r"store = 'there': .*expected a URL"):
        load(cloud, ["features=here", "store=there"])
    assert load(cloud, ["features=here"]).store is None
    assert load(cloud, ["features=here", "store=s3://b/p"]).features == Path("here")
