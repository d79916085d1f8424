"""What of a finished run goes to the Hugging Face Hub, and under which name."""

from pathlib import Path

from ..evaluation.model_card import RunDescription

# Named one by one: whatever else lies in a run's folder stays there. Predictions are left out because their rows, one
# for each test cycle, are of use only beside the dataset that they were made on.
REQUIRED = ("README.md", "config.json", "metrics.json", "preprocessor_config.json", "recipe.yaml")
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*_qlung.py", "*.png", "flatness.json")


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
    card = (run_dir / "README.md").read_text(encoding="utf-8")
    return {**files, **found, "README.md": card.replace(RunDescription.repo_id, repo_id).encode()}
