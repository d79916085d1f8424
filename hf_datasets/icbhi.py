"""The ICBHI 2017 Respiratory Sound Database (Rocha et al. 2017): 920 recordings of 126 patients, 6,898 cycles.

Layout of `data_dir`, as unpacked from the challenge site (the metadata files may also lie inside the database folder):

    ICBHI_final_database/*.wav *.txt
    ICBHI_challenge_train_test.txt                                        official split, by recording
    ICBHI_Challenge_demographic_information.txt or demographic_info.txt   optional: age, sex, BMI
    ICBHI_Challenge_diagnosis.txt or patient_diagnosis.csv                optional: diagnosis
"""

import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .recordings import Cycle, Recording, check_counts, download

logger = logging.getLogger(__name__)

# The site publishes no checksums.
URL = "https://bhichallenge.med.auth.gr/sites/default/files/ICBHI_final_database"
DATABASE = "ICBHI_final_database"
SPLIT_FILES = ("ICBHI_challenge_train_test.txt",)
DEMOGRAPHIC_FILES = ("ICBHI_Challenge_demographic_information.txt", "demographic_info.txt")
DIAGNOSIS_FILES = ("ICBHI_Challenge_diagnosis.txt", "patient_diagnosis.csv")

RECORDINGS = {"train": 539, "test": 381}
CYCLES = {
    "train": {"normal": 2063, "crackle": 1215, "wheeze": 501, "both": 363},
    "test": {"normal": 1579, "crackle": 649, "wheeze": 385, "both": 143},
}

# The five patient-wise folds of RespireNet (Gairola et al. 2021), as kept with Patch-Mix CL (Bae et al. 2023).
FOLDS = (
    "107 114 130 138 146 147 154 156 158 160 162 163 170 172 177 180 184 186 193 200 203 204 205 207 211 213",
    "101 108 115 120 127 131 137 152 153 161 167 168 173 183 188 197 201 206 208 210 215 216 218 223 224",
    "105 110 111 116 121 123 125 129 136 144 148 157 159 164 165 166 169 179 182 190 196 209 217 222 225",
    "103 104 106 112 117 118 122 124 128 132 134 140 141 142 155 175 185 191 192 195 199 212 219 220 226",
    "102 109 113 119 126 133 135 139 143 145 149 150 151 171 174 176 178 181 187 189 194 198 202 214 221",
)
_FOLD_OF = {patient: fold for fold, patients in enumerate(FOLDS) for patient in patients.split()}

_NAME = re.compile(r"(\d{3})_(\w{3})_(Tc|Al|Ar|Pl|Pr|Ll|Lr)_(sc|mc)_(AKGC417L|LittC2SE|Litt3200|Meditron)")


@dataclass(frozen=True)
class Files:
    """Where the parts of the database lie; the last two are None where absent."""

    database: Path
    split: Path
    demographics: Path | None
    diagnosis: Path | None


def read(data_dir: str | None, cache_dir: str | None) -> dict[str, list[Recording]]:
    """Recordings of `train` and `test`, with `audio` None where the audio or the annotation is missing.

    Args:
        data_dir: folder that holds `ICBHI_final_database`; None downloads.
        cache_dir: where downloads are kept; None: the cache of `datasets`.

    Raises:
        FileNotFoundError: the database or its split file is not there.
        ValueError: a malformed file, or counts other than the published ones.
        ConnectionError: the download failed.
    """
    files = _download(cache_dir) if data_dir is None else _locate(Path(data_dir))
    split_of = read_split(files.split)
    audio, annotations = _by_name(files.database, "wav"), _by_name(files.database, "txt")
    if unlisted := sorted((audio.keys() | annotations.keys()) - split_of.keys()):
        logger.warning("%s does not list %s: left out", files.split, ", ".join(unlisted))
    demographics = read_demographics(files.demographics) if files.demographics else {}
    diagnoses = read_diagnoses(files.diagnosis) if files.diagnosis else {}

    splits: dict[str, list[Recording]] = {"train": [], "test": []}
    for name in sorted(split_of):
        patient, _, location, mode, device = name.split("_")
        metadata = {
            "location": location,
            "device": device,
            "mode": mode,
            **demographics.get(patient, {}),
            "diagnosis": diagnoses.get(patient),
            "fold": _FOLD_OF.get(patient),
        }
        annotated = name in annotations
        cycles = read_annotation(annotations[name]) if annotated else []
        recording = Recording(name, patient, audio.get(name) if annotated else None, cycles, metadata)
        splits[split_of[name]].append(recording)
    _check(splits, annotations)
    return splits


def canonical_name(name: str) -> str:
    """The name that a recording has in the final database, from that name or one it had before.

    91 recordings were published first under another device (`filename_differences.txt` has their old names): all are
    sequential ("sc") recordings, said to be by AKGC417L or LittC2SE, and by Meditron since. One was not renamed,
    226_1b1_Pl_sc_LittC2SE, though the published split file calls it 226_1b1_Pl_sc_Meditron; the name of the audio
    and its annotation is kept.
    """
    key, _, device = name.rpartition("_")
    if key == "226_1b1_Pl_sc":
        return f"{key}_LittC2SE"
    if key.endswith("_sc") and device in ("AKGC417L", "LittC2SE"):
        return f"{key}_Meditron"
    return name


def read_split(path: Path) -> dict[str, str]:
    """`train` or `test` for each recording, by canonical name.

    Raises:
        ValueError: a line is not a recording's name and its split, or a recording stands twice.
    """
    splits: dict[str, str] = {}
    for number, words in _lines(path):
        if len(words) != 2 or not _NAME.fullmatch(words[0]) or words[1] not in ("train", "test"):
            raise ValueError(f"{path}, line {number}: {' '.join(words)!r} is not a recording and train or test")
        name = canonical_name(words[0])
        if name in splits:
            raise ValueError(f"{path}, line {number}: {words[0]} stands there twice")
        splits[name] = words[1]
    return splits


def read_annotation(path: Path) -> list[Cycle]:
    """The cycles of one recording: lines of start and end (s), crackles and wheezes (0 or 1).

    Raises:
        ValueError: a line is something else, or its end does not come after its start.
    """
    cycles = []
    for number, words in _lines(path):
        source = f"{path}, line {number}"
        try:
            start, end = map(float, words[:2])
            crackle, wheeze = ({"0": False, "1": True}[word] for word in words[2:])
        except (ValueError, KeyError):
            raise ValueError(f"{source}: {' '.join(words)!r} is not start, end, crackles, wheezes") from None
        if not 0 <= start < end:
            raise ValueError(f"{source}: the cycle ends at {end} s and starts at {start} s")
        cycles.append(Cycle(start, end, crackle, wheeze, source))
    return cycles


def read_demographics(path: Path) -> dict[str, dict[str, Any]]:
    """Age (years), sex and BMI (kg/m²) of each patient; None for NA.

    Lines hold number, age, sex, adult BMI, child weight (kg), child height (cm). A child's BMI is weight / height².

    Raises:
        ValueError: a line holds something else.
    """
    patients = {}
    for number, words in _lines(path):
        try:
            patient, age, sex, bmi, weight, height = (None if word == "NA" else word for word in words)
            if sex not in ("M", "F", None):
                raise ValueError
            index = float(bmi) if bmi else None
            if weight and height:
                index = index or float(weight) / (float(height) / 100) ** 2
            patients[str(patient)] = {"age": float(age) if age else None, "sex": sex, "bmi": index}
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: {' '.join(words)!r} is not patient, age, sex, adult BMI, weight, height"
            ) from None
    return patients


def read_diagnoses(path: Path) -> dict[str, str]:
    """Diagnosis of each patient, from either published form (tabs, or a CSV file with or without its header).

    Raises:
        ValueError: a line is not a patient and a diagnosis.
    """
    diagnoses = {}
    for number, words in _lines(path):
        if len(words) != 2:
            raise ValueError(f"{path}, line {number}: {' '.join(words)!r} is not a patient and a diagnosis")
        diagnoses[words[0]] = words[1]
    return diagnoses


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """(number, words) of every line that is not blank; words end at blanks, tabs or commas."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    return [(number, re.split(r"[\s,]+", line.strip())) for number, line in lines if line.strip()]


def _by_name(folder: Path, suffix: str) -> dict[str, Path]:
    """The files that are named as recordings, by canonical name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*.{suffix}")):
        if not _NAME.fullmatch(path.stem):
            continue
        name = canonical_name(path.stem)
        if name in found:
            raise ValueError(f"{found[name]} and {path.name} are one recording under two names: remove one of them")
        found[name] = path
    return found


def _locate(data_dir: Path) -> Files:
    database = data_dir / DATABASE
    if not database.is_dir():
        raise FileNotFoundError(f"{data_dir} holds no folder {DATABASE}. {_by_hand()}")
    split, demographics, diagnosis = (
        next((folder / name for folder in (data_dir, database) for name in names if (folder / name).is_file()), None)
        for names in (SPLIT_FILES, DEMOGRAPHIC_FILES, DIAGNOSIS_FILES)
    )
    if split is None:
        raise FileNotFoundError(f"{data_dir} holds no {SPLIT_FILES[0]}, the official split. {_by_hand()}")
    for path, names in ((demographics, DEMOGRAPHIC_FILES), (diagnosis, DIAGNOSIS_FILES)):
        if path is None:
            logger.warning("%s holds no %s: its columns will be null", data_dir, " or ".join(names))
    return Files(database, split, demographics, diagnosis)


def _download(cache_dir: str | None) -> Files:
    names = {
        "database": f"{DATABASE}.zip",
        "split": SPLIT_FILES[0],
        "demographics": DEMOGRAPHIC_FILES[0],
        "diagnosis": DIAGNOSIS_FILES[0],
    }
    paths = download({part: f"{URL}/{name}" for part, name in names.items()}, cache_dir, _by_hand())
    database = paths["database"] / DATABASE
    if not database.is_dir():
        raise ValueError(f"{URL}/{DATABASE}.zip, kept as {paths['database']}, holds no {DATABASE}. {_by_hand()}")
    return Files(database, paths["split"], paths["demographics"], paths["diagnosis"])


def _by_hand() -> str:
    files = ", ".join((SPLIT_FILES[0], DEMOGRAPHIC_FILES[0], DIAGNOSIS_FILES[0]))
    return (
        f"Download {DATABASE}.zip, {files} from {URL}/ by hand, unpack the zip, put the text files beside the folder "
        f"{DATABASE}, and give the folder that holds them all as data_dir."
    )


def _check(splits: dict[str, list[Recording]], annotations: dict[str, Path]) -> None:
    check_counts("ICBHI's official split", {split: len(splits[split]) for split in splits}, RECORDINGS)
    if len(annotations) < sum(RECORDINGS.values()):
        return
    for split, recordings in splits.items():
        labels = Counter(cycle.label for recording in recordings for cycle in recording.cycles)
        check_counts(f"ICBHI's {split} split", labels, CYCLES[split])
