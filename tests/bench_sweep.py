"""An ablation of 24 small runs by one worker and by two side by side: python tests/bench_sweep.py [--small]

Each worker makes one run at a time, in one process with one thread, so two quiet cores are enough. Runs share
no training (no memo). Two must be 1.8 times as fast as one, with the same bytes. `--small` has 4 runs and no
gate on speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import ROOT, write_llava

_WEIGHTS = ROOT / "pipeline/world/weights"


def experiment(root: Path, small: bool) -> Path:
    """Two silos and held-out pictures for the embedded default's models; an ablation over them."""
    for place, (silo, images) in enumerate({"one": 60, "two": 60, "heldout": 24}.items()):
        write_llava(root / silo, images, first=1000 * place)
    silos = "\n".join(
        f'{name} = {{ name = "llava_json", path = "{root}/{name}/pairs.json", images = "{root}/{name}"'
        + (', split = "test" }' if name == "heldout" else " }")
        for name in ("one", "two", "heldout")
    )
    (root / "small.toml").write_text(
        f"""
experiment = "small"
features = "{root}/features"
build = "{root}/build"
[extract.encoder]
name = "transformers"
path = "{_WEIGHTS}/clip"
[extract.silos]
{silos}
[language]
path = "{_WEIGHTS}/llama"
[federate]
silos = ["one", "two"]
rounds = 6
passes = {1 if small else 20}
batch_size = 4
[evaluate]
silo = "heldout"
images = "{root}/heldout"
[evaluate.benchmarks.loss]
name = "heldout_loss"
"""
    )
    path = root / "sweep.toml"
    path.write_text(
        f"""
name = "sweep"
seeds = [{"0, 1" if small else "0, 1, 2, 3, 4, 5"}]
measures = ["loss: loss"]
[scenarios]
small = "{root}/small.toml"
[strategies]
fedavg = {{}}
fedcmp = {{}}
{"" if small else "fedavgm = {}"}
{"" if small else "fednova = {}"}
"""
    )
    return path


def sweep(path: Path, build: str, workers: int) -> float:
    """Seconds until all workers are done; what was extracted before is used."""
    text = path.read_text()
    mine = path.with_name(f"{build}.toml")
    mine.write_text(text.replace("[scenarios]", f'set = ["build={path.parent}/{build}"]\n[scenarios]'))
    command = [sys.executable, "-m", "fedcmp", "ablate", str(mine), "--jobs", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    each = [
        subprocess.Popen(
            [*command, "--worker", f"{number}/{workers}"],
            cwd=path.parent,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for number in range(workers)
    ]
    assert [process.wait() for process in each] == [0] * workers
    return time.monotonic() - began


def main(small: bool) -> int:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder).absolute()
        path = experiment(root, small)
        extract = [sys.executable, "-m", "fedcmp", "extract", str(root / "small.toml")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(extract, check=True, cwd=root, env=environment, stdout=subprocess.DEVNULL)
        one, two = (sweep(path, f"by_{workers}", workers) for workers in (1, 2))
        projectors = [
            {str(file.relative_to(root / build)): file.read_bytes() for file in files}
            for build in ("by_1", "by_2")
            for files in [sorted((root / build).rglob("projector.safetensors"))]
        ]
    same = projectors[0] == projectors[1]
    busy = os.getloadavg()[0]
    print(f"{len(projectors[0])} runs: one worker {one:.1f} s, two {two:.1f} s; load average {busy:.1f}")
    gates = {
        f"two workers are 1.8 times as fast: {one / two:.2f}": one / two >= 1.8 or small,
        "the same bytes": same,
    }
    for gate, passed in gates.items():
        print(f"{'passed' if passed else 'MISSED'}: {gate}")
    return 0 if all(gates.values()) else 1


if __name__ == "__main__":
    sys.exit(main("--small" in sys.argv))
