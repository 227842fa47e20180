"""The embedded default in a folder of one's own: data and experiment files, wherever FedCMP is installed."""

from __future__ import annotations

from pathlib import Path

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import write_atomic
from fedcmp.pipeline.world.write import Amounts, write

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"


def demo(folder: Path | str = ".", **amounts: int) -> list[Path]:
    """Write `configs/demo.toml`, a run a file in `configs/demo/`, and their data in `build/world`.

    Args:
        folder: Where; paths in the files are relative to it.
        **amounts: As `fedcmp.pipeline.world.write.Amounts` has them, such as `silo_images=300`.

    Returns:
        The runs' experiment files.

    Raises:
        UserError: Another file of such a name is there.
    """
    folder, configs = Path(folder), HERE / "configs"
    files = [configs / "demo.toml", *sorted(configs.glob("demo/*.toml"))]
    texts = {folder / "configs" / file.relative_to(configs): _placed(file.read_text()) for file in files}
    for path, text in texts.items():
        if path.exists() and path.read_text() != text:
            raise UserError(f"{path}: another file is there; give another folder")
    for path, text in texts.items():
        write_atomic(path, text.encode())
    write(folder / "build/world", Amounts(**amounts))  # type: ignore[arg-type]
    return list(texts)[1:]


def _placed(text: str) -> str:
    """An experiment file with the weights that came with the package."""
    return text.replace('"pipeline/world/weights/', f'"{WEIGHTS}/')
