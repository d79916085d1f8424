"""SPRSound's recordings, where they are at hand: what they were called, and folders with some of them."""

import json
from collections.abc import Iterable
from pathlib import Path


def annotations(root: Path) -> dict[str, str]:
    """Give what each training recording was called, by its name; `root` holds BioCAS2022."""
    paths = sorted((root / "BioCAS2022" / "train2022_json").glob("*.json"))
    return {path.stem: json.loads(path.read_text())["record_annotation"] for path in paths}


def wav(root: Path, name: str) -> Path:
    """Give the file of a training recording."""
    return root / "BioCAS2022" / "train2022_wav" / f"{name}.wav"


def link(root: Path, folder: Path, train: Iterable[str], inter_test: Iterable[str] = ()) -> None:
    """Make a folder like `root` with links to some training recordings, a few as the inter-subject test."""
    target = folder / "BioCAS2022"
    splits = [("train2022_wav", "train2022_json", train)]
    splits += [("test2022_wav", "test2022_json/inter_test_json", inter_test)] if inter_test else []
    for audio, annotated, names in splits:
        for part in (audio, annotated):
            (target / part).mkdir(parents=True)
        for name in names:
            (target / audio / f"{name}.wav").symlink_to(wav(root, name))
            source = root / "BioCAS2022" / "train2022_json" / f"{name}.json"
            (target / annotated / source.name).symlink_to(source)
