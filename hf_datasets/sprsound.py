"""SPRSound as of the BioCAS 2022 challenge (Zhang et al. 2022): children's recordings at 8 kHz, with events.

Layout of `data_dir`, as in the authors' repository:

    BioCAS2022/train2022_wav  BioCAS2022/train2022_json
    BioCAS2022/test2022_wav   BioCAS2022/test2022_json/intra_test_json  BioCAS2022/test2022_json/inter_test_json

A part that is absent is an absent split.
"""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from .labels import EVENT_TYPES, RECORD_LABELS, event_flags
from .recordings import Cycle, Recording, check_counts, download

logger = logging.getLogger(__name__)

# A commit names its content, so this archive never changes; no checksum is published for it.
COMMIT = "174500e401f4ebf54061414c2fe082c7dccfb9d2"
URL = f"https://github.com/SJTU-YONGFU-RESEARCH-GRP/SPRSound/archive/{COMMIT}.zip"
ROOT = "BioCAS2022"

# split: (folder of the audio, folder of the annotations)
FOLDERS = {
    "train": ("train2022_wav", "train2022_json"),
    "test_intra": ("test2022_wav", "test2022_json/intra_test_json"),
    "test_inter": ("test2022_wav", "test2022_json/inter_test_json"),
}
RECORDINGS = {"train": 1949, "test_intra": 379, "test_inter": 355}
EVENTS = {"train": 6656, "test_intra": 1004, "test_inter": 1429}
# In the order of EVENT_TYPES. The types of the inter-subject test set are not published apart from their total.
EVENTS_BY_TYPE = {
    "train": (5159, 39, 452, 15, 49, 912, 30),
    "test_intra": (688, 14, 108, 2, 14, 175, 3),
}

DEVICE = "Yunting model II"
_SEX = {"0": "M", "1": "F"}
_LOCATIONS = ("p1", "p2", "p3", "p4")


def read(
    data_dir: str | None, cache_dir: str | None, continuous_as_wheeze: bool = False, allow_missing: bool = False
) -> dict[str, list[Recording]]:
    """Recordings of the splits that are there, with `audio` None where it is missing.

    Args:
        data_dir: folder that holds `BioCAS2022`; None downloads.
        cache_dir: where downloads are kept; None: the cache of `datasets`.
        continuous_as_wheeze: count Rhonchi and Stridor as wheezes.
        allow_missing: warn where a split lacks annotation files, instead of raising.

    Raises:
        FileNotFoundError: no split is there, or one lacks annotation files.
        ValueError: a malformed file, or counts other than the published ones.
        ConnectionError: the download failed.
    """
    root = _download(cache_dir) if data_dir is None else Path(data_dir) / ROOT
    present = {split: parts for split, parts in FOLDERS.items() if all((root / part).is_dir() for part in parts)}
    if not present:
        wanted = ", ".join(part for parts in FOLDERS.values() for part in parts)
        raise FileNotFoundError(f"{root} holds no audio folder with its annotations ({wanted}). {_by_hand()}")
    for split, parts in FOLDERS.items():
        if split not in present:
            logger.warning("%s holds no %s: no split %s", root, " with ".join(parts), split)
    splits = {}
    for split, (audio, annotations) in present.items():
        splits[split] = _read_part(root / audio, root / annotations, continuous_as_wheeze)
        _check(split, splits[split], root / annotations, allow_missing)
    if not any(splits.values()):
        raise FileNotFoundError(f"{root} holds folders, and no annotated recording in them. {_by_hand()}")
    return splits


def read_annotation(path: Path, continuous_as_wheeze: bool = False) -> tuple[str, list[Cycle]]:
    """The record label and the events of one recording's JSON file; times in ms there, as text or numbers.

    Raises:
        ValueError: the file is not JSON, or has another label, event type or time than the format allows.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        # The files say `record_annotation`, some of the authors' documents `recording_annotation`.
        record_label = content["record_annotation" if "record_annotation" in content else "recording_annotation"]
        events = content["event_annotation"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an SPRSound annotation ({error!r}): download it again") from error
    if record_label not in RECORD_LABELS:
        raise ValueError(f"{path}: unknown record label {record_label!r}: it must be one of {', '.join(RECORD_LABELS)}")
    return record_label, [
        _read_event(event, f"{path}, event {number}", continuous_as_wheeze)
        for number, event in enumerate(events, start=1)
    ]


def _read_event(event: dict[str, Any], source: str, continuous_as_wheeze: bool) -> Cycle:
    try:
        start, end, event_type = float(event["start"]) / 1000, float(event["end"]) / 1000, event["type"]
        crackle, wheeze = event_flags(event_type, continuous_as_wheeze)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: {event!r} is not start, end and type ({error})") from error
    if not 0 <= start < end:
        raise ValueError(f"{source}: the event ends at {end} s and starts at {start} s")
    return Cycle(start, end, crackle, wheeze, source, event_type)


def _read_part(audio: Path, annotations: Path, continuous_as_wheeze: bool) -> list[Recording]:
    recordings = []
    for path in sorted(annotations.glob("[!.]*.json")):
        record_label, events = read_annotation(path, continuous_as_wheeze)
        wav = audio / f"{path.stem}.wav"
        recordings.append(
            Recording(
                recording_id=path.stem,
                patient_id=path.stem.split("_")[0],
                audio=wav if wav.is_file() else None,
                cycles=events,
                metadata={**_read_name(path), "device": DEVICE, "record_label": record_label},
            )
        )
    return recordings


def _read_name(path: Path) -> dict[str, Any]:
    """Age (years), sex and location from `patient_age_gender_location_number`."""
    try:
        _, age, gender, location, _ = path.stem.split("_")
        if location not in _LOCATIONS:
            raise ValueError
        return {"age": float(age), "sex": _SEX[gender], "location": location}
    except (ValueError, KeyError):
        raise ValueError(f"{path} is not named patient_age_gender(0 or 1)_location(p1 to p4)_number") from None


def _check(split: str, recordings: list[Recording], folder: Path, allow_missing: bool) -> None:
    if len(recordings) < RECORDINGS[split]:
        message = f"{folder} has {len(recordings):,} of the {RECORDINGS[split]:,} annotation files of {split}"
        if not allow_missing:
            raise FileNotFoundError(f"{message}. Complete it, or pass allow_missing_audio=True to go on without them.")
        logger.warning(message)
        return
    check_counts(f"SPRSound's {split} split", {"recordings": len(recordings)}, {"recordings": RECORDINGS[split]})
    types = Counter(event.event_type for recording in recordings for event in recording.cycles)
    check_counts(f"SPRSound's {split} split", {"events": types.total()}, {"events": EVENTS[split]})
    if split in EVENTS_BY_TYPE:
        expected = dict(zip(EVENT_TYPES, EVENTS_BY_TYPE[split], strict=True))
        check_counts(f"SPRSound's {split} split", types, expected)


def _download(cache_dir: str | None) -> Path:
    archive = download({"archive": URL}, cache_dir, _by_hand())["archive"]
    # The authors' repository has held the folder at its top and below `releases`.
    top = archive / f"SPRSound-{COMMIT}"
    root = max((top / ROOT, top / "releases" / ROOT), key=lambda folder: len(list(folder.glob("*_wav/*.wav"))))
    if not root.is_dir():
        raise ValueError(f"{URL}, kept as {archive}, holds no SPRSound-{COMMIT}/{ROOT}. {_by_hand()}")
    return root


def _by_hand() -> str:
    return f"Download {URL} by hand, unpack it, and give the folder that holds {ROOT} as data_dir."
