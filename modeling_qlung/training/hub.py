"""What of a finished run goes to the Hugging Face Hub, and under which name; the same in half the size, in a folder.

python -m modeling_qlung.training.hub RUN FOLDER
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..evaluation.model_card import WHOLE_RECORDINGS, RunDescription, describe_operating_points
from ..inference.operating_points import FILE_NAME as OPERATING_POINTS
from ..inference.operating_points import OperatingPoints

# Named one by one: whatever else lies in a run's folder stays there. Predictions are left out because their rows, one
# for each test cycle, are of use only beside the dataset that they were made on.
REQUIRED = ("README.md", "config.json", "metrics.json", "preprocessor_config.json", "recipe.yaml")
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*_qlung.py", "*.png", "flatness.json", OPERATING_POINTS)


def repository_name(model_id: str, folder: Path, output_dir: Path) -> str:
    """Name the repository of one run: each of several seeds and folds has its own.

    `output_dir/fold_0/seed_1` becomes `MODEL_ID-fold-0-seed-1`, and `output_dir` itself `MODEL_ID`.
    """
    return "-".join([model_id, *(part.replace("_", "-") for part in folder.relative_to(output_dir).parts)])


def run_files(run_dir: Path, repo_id: str) -> dict[str, Path | bytes]:
    """Give what is uploaded of a run that has ended: checkpoint, code, preparation, card, recipe, scores, figures.

    Args:
        run_dir: folder of the run.
        repo_id: Hub id, for the examples in the card.

    Returns:
        Name in the repository -> file, or its content where that differs.

    Raises:
        FileNotFoundError: the folder does not hold a whole run.
    """
    files: dict[str, Path | bytes] = {name: run_dir / name for name in REQUIRED}
    found = {path.name: path for pattern in PATTERNS for path in sorted(run_dir.glob(pattern))}
    missing = [name for name in REQUIRED if not (run_dir / name).is_file()]
    if missing or not any(name.endswith(".safetensors") for name in found):
        lacking = ", ".join(missing) or "the weights"
        raise FileNotFoundError(f"{run_dir} is no run that has ended, it lacks {lacking}: run it to its end first")
    card = (run_dir / "README.md").read_text(encoding="utf-8").replace(RunDescription.repo_id, repo_id)
    if OPERATING_POINTS in found:
        card, _, _ = card.partition(f"\n{WHOLE_RECORDINGS}\n")  # of a run that was published before
        card = f"{card}\n{describe_operating_points(OperatingPoints.from_file(found[OPERATING_POINTS]))}\n"
    return {**files, **found, "README.md": card.encode()}


def write_half(run_dir: Path, folder: Path) -> None:
    """Write what is published of a run into a folder, in the place of what was there, with weights in half precision.

    They are stored as float16 and opened as float32, which `config.json` goes on to say.

    Raises:
        FileNotFoundError: `run_dir` does not hold a whole run.
        FileExistsError: `folder` holds something else than a published run.
    """
    files = run_files(run_dir, "/".join(folder.parts[-2:]))
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise FileExistsError(f"{folder} is there and is no published run: choose another")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name, content in files.items():
        if name.endswith(".safetensors"):
            half = {key: value.half() for key, value in load_file(run_dir / name).items()}
            save_file(half, folder / name, metadata={"format": "pt"})
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def main(argv: Sequence[str] | None = None) -> None:
    """Write what is published of a run into a folder, with weights in half precision."""
    parser = argparse.ArgumentParser("python -m modeling_qlung.training.hub", description=main.__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of train.py that has ended")
    parser.add_argument("folder", type=Path, help="what to write, such as space/model")
    args = parser.parse_args(argv)
    try:
        write_half(args.run, args.folder)
    except OSError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
