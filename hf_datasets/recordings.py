"""Recordings and their cycles as the readers find them, and what is checked before anything is built from them."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from .labels import LABELS, label_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cycle:
    """A respiratory cycle (ICBHI) or event (SPRSound): `start` and `end` in seconds; `source` names file and line."""

    start: float
    end: float
    crackle: bool | None
    wheeze: bool | None
    source: str
    event_type: str | None = None

    @property
    def label(self) -> str | None:
        """One of `LABELS`, or None where none of the four classes fits."""
        return label_of(self.crackle, self.wheeze)


@dataclass(frozen=True)
class Recording:
    """A recording: where its samples come from (None: missing), its cycles, and values of the metadata columns."""

    recording_id: str
    patient_id: str
    audio: Any
    cycles: list[Cycle]
    metadata: dict[str, Any] = field(default_factory=dict)


def usable(splits: dict[str, list[Recording]], allow_missing: bool) -> tuple[dict[str, list[Recording]], str]:
    """The recordings that have their audio, and a sentence on those that have not ("" where none is missing).

    Splits where no recording has audio are left out.

    Raises:
        FileNotFoundError: some recordings have no audio and `allow_missing` is false, or none has; the message counts.
    """
    missing = [r.recording_id for recordings in splits.values() for r in recordings if r.audio is None]
    splits = {split: [r for r in recordings if r.audio is not None] for split, recordings in splits.items()}
    splits = {split: recordings for split, recordings in splits.items() if recordings}
    message = ""
    if missing:
        found = sum(map(len, splits.values()))
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        message = (
            f"{len(missing):,} of {len(missing) + found:,} recordings lack their audio or annotation file: {first}"
        )
        if not (allow_missing and found):
            raise FileNotFoundError(
                f"{message}. Put them in place, or pass allow_missing_audio=True to use the {found:,} that are there."
                if found
                else f"{message}. There is nothing to work on: unpack the audio first."
            )
        message = f"{message}. Left: {'; '.join(map(_describe, splits, splits.values()))}."
        logger.warning(message)
    return splits, message


def _describe(split: str, recordings: list[Recording]) -> str:
    counts = Counter(cycle.label or "no class" for recording in recordings for cycle in recording.cycles)
    names = (*LABELS, "no class") if counts["no class"] else LABELS
    classes = ", ".join(f"{name} {counts[name]:,}" for name in names)
    return f"{split} {counts.total():,} cycles of {len(recordings):,} recordings ({classes})"


def fingerprint(splits: dict[str, list[Recording]]) -> str:
    """Digest of everything that the tables are made from: annotations, metadata, audio files and this package's code.

    `datasets` keys its cache by name, options and version alone, and would serve old rows after files were added or
    corrected.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for split, recordings in splits.items():
        for recording in recordings:
            file = Path(recording.audio).stat() if isinstance(recording.audio, Path) else None
            stamp = None if file is None else (str(recording.audio), file.st_size, file.st_mtime_ns)
            content = (split, recording.recording_id, recording.patient_id, recording.cycles, recording.metadata, stamp)
            digest.update(repr(content).encode())
    return digest.hexdigest()[:32]


def check_counts(name: str, found: Mapping[Any, int], expected: Mapping[str, int]) -> None:
    """Compare what was read with what the dataset's authors published.

    Raises:
        ValueError: they differ; the message has the entries that do.
    """
    differing = [key for key in expected if found.get(key, 0) != expected[key]]
    if differing:
        pairs = "; ".join(f"{key}: found {found.get(key, 0):,}, expected {expected[key]:,}" for key in differing)
        raise ValueError(f"{name} does not have its published counts: {pairs}. Download its annotations again.")


def download(urls: dict[str, str], cache_dir: str | None, by_hand: str) -> dict[str, Path]:
    """Download and unpack through the `datasets` download manager; files already in its cache need no network.

    Raises:
        ConnectionError: a download failed; `by_hand` ends the message and says what to do instead.
    """
    downloads = Path(cache_dir, "downloads") if cache_dir else datasets.config.DOWNLOADED_DATASETS_PATH
    # Without ETags a cached file is found without asking the server; these files never change.
    config = datasets.DownloadConfig(cache_dir=downloads, use_etag=False)
    try:
        paths = datasets.DownloadManager(download_config=config).download_and_extract(urls)
    except Exception as error:  # fsspec and aiohttp raise many kinds, FileNotFoundError for an unreachable host too
        failed = f"{', '.join(urls.values())} could not be downloaded ({type(error).__name__}: {error})"
        raise ConnectionError(f"{failed}. {by_hand}") from error
    return {name: Path(path) for name, path in paths.items()}
