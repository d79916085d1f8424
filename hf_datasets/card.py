"""The card of a published dataset, README.md beside its Parquet files, and the figure in it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData
from matplotlib.figure import Figure

from . import icbhi, sprsound
from .labels import LABELS
from .recordings import Recording

FIGURE = "cycles.png"
_UNLABELLED = "no label"
_COLOURS = ("#0072b2", "#d55e00", "#009e73")  # Okabe and Ito's, told apart by colour-blind readers too


@dataclass(frozen=True)
class Source:
    """What a card tells of a dataset wherever its files come from.

    Args:
        title: of the card.
        summary: what the dataset is, a paragraph.
        licence: the Hub's name of it; "other" where `licence_name` and `licence_link` say more.
        terms: what may be done with the data, a sentence or two.
        reference: whom to cite.
        traps: what has led others astray, a sentence or two each.
        citation: BibTeX.
        recordings: how many were published in each split; empty where that is free.
        annotators: the Hub's name of who made the labels.
    """

    title: str
    summary: str
    licence: str
    terms: str
    reference: str
    traps: tuple[str, ...]
    citation: str = ""
    recordings: Mapping[str, int] = field(default_factory=dict)
    annotators: str = "expert-generated"
    licence_name: str | None = None
    licence_link: str | None = None


SOURCES = {
    "icbhi": Source(
        title="ICBHI 2017 Respiratory Sound Database",
        summary="Lung sounds of patients of all ages, recorded in Portugal and Greece with four devices, the times of "
        "every respiratory cycle, and whether crackles or wheezes are heard in it. The benchmark of the ICBHI 2017 "
        "challenge, with its official split.",
        licence="other",
        licence_name="icbhi-2017-free-for-research",
        licence_link="https://bhichallenge.med.auth.gr",
        terms="The database is free for research, on the terms of its site, which hold for this copy too.",
        reference="B. M. Rocha et al., An open access database for the evaluation of respiratory sound classification "
        "algorithms, Physiological Measurement 40(3), 2019",
        traps=(
            "The official split is by recording: patients 156 and 218 are in both splits. `fold` has the five "
            "patient-wise folds of RespireNet (Gairola et al. 2021) instead.",
            "91 recordings were published under another device first, and the published split file calls "
            "226_1b1_Pl_sc_LittC2SE by a name that no file has. `recording_id` is the name in the final database.",
            "Recordings are at 4, 10 or 44.1 kHz and 16 or 24 bit, by device. Here they keep their rate and bits. A "
            "model can hear the device; compare scores by device.",
            "Cycles last 0.2 to 16.2 s. Most papers cut or repeat them to 8 s.",
            "Most published scores chose their epoch on the test split. Keep patients of the training split for that.",
        ),
        citation="""\
@article{rocha2019open,
  title   = {An open access database for the evaluation of respiratory sound classification algorithms},
  author  = {Rocha, Bruno M. and Filos, Dimitris and Mendes, Lu{\\'i}s and others},
  journal = {Physiological Measurement},
  volume  = {40},
  number  = {3},
  pages   = {035001},
  year    = {2019}
}""",
        recordings=icbhi.RECORDINGS,
    ),
    "sprsound": Source(
        title="SPRSound 2022 (BioCAS challenge)",
        summary="Lung sounds of children of one hospital in Shanghai at 8 kHz, recorded with one model of stethoscope, "
        "with the times and types of respiratory events and a label of every recording, that of poor quality among "
        "them. The splits are those of the BioCAS 2022 challenge.",
        licence="other",
        licence_name="sprsound",
        licence_link="https://github.com/SJTU-YONGFU-RESEARCH-GRP/SPRSound",
        terms="The terms in the authors' repository hold for this copy too.",
        reference="Q. Zhang et al., SPRSound: Open-Source SJTU Paediatric Respiratory Sound Database, IEEE "
        "Transactions on Biomedical Circuits and Systems 16(5), 2022",
        traps=(
            "`test_intra` holds other recordings of children of the training split, by design; `test_inter` holds "
            "other children.",
            "Recordings labelled Poor Quality have no event: they are rows of `recordings` and not of `cycles`.",
            "Rhonchi and stridor are none of the four classes: their `label`, `crackle` and `wheeze` are null, their "
            "`event_type` is not.",
            "Classes are far from balanced: three in four events are normal, one in two hundred is both.",
            "The published WAV files have a malformed header (block align 4 for 16-bit mono), which some readers "
            "refuse. Here the header is right and every sample as it was.",
            "Times are in seconds here, in milliseconds in the published files.",
        ),
        citation="""\
@article{zhang2022sprsound,
  title   = {{SPRSound}: Open-Source {SJTU} Paediatric Respiratory Sound Database},
  author  = {Zhang, Qing and others},
  journal = {IEEE Transactions on Biomedical Circuits and Systems},
  volume  = {16},
  number  = {5},
  year    = {2022}
}""",
        recordings=sprsound.RECORDINGS,
    ),
    "simulated": Source(
        title="Simulated lung sounds",
        summary="Breath sounds, fine and coarse crackles and wheezes, synthesised after their textbook forms, through "
        "four made-up devices and in noise of known level. For trying out a training, and for tests that must know the "
        "truth.",
        licence="apache-2.0",
        terms="Nobody was recorded; do with it what you like.",
        reference="none; the sounds are synthesised",
        traps=(
            "There is no patient: scores on it say nothing about real recordings.",
            "Age, sex and BMI are drawn at random and tell nothing about the sounds.",
        ),
        annotators="machine-generated",
    ),
}

COLUMNS = {
    "audio": "WAV bytes at the original rate and bit depth: of the cycle, or of the whole recording",
    "label": "normal, crackle, wheeze or both",
    "crackle": "whether crackles are heard",
    "wheeze": "whether wheezes are heard",
    "event_type": "the annotators' type of the event",
    "cycle_index": "position in the recording's annotation, from 0",
    "start": "beginning in the recording, in seconds",
    "end": "end in the recording, in seconds",
    "recording_id": "name of the recording",
    "patient_id": "the dataset's own public number of the patient",
    "location": "where on the chest",
    "device": "stethoscope",
    "mode": "sc: one place after the other; mc: several at once",
    "age": "years",
    "sex": "M or F",
    "bmi": "body mass index, kg/m²",
    "diagnosis": "diagnosis of the patient",
    "fold": "RespireNet's patient-wise fold, 0 to 4",
    "record_label": "label of the recording, all kinds of adventitious sounds and poor quality among them",
    "snr_db": "signal-to-noise ratio of the recording, in dB",
    "cycles": "list of the recording's cycles or events",
}


def incomplete(source: Source, recordings: Mapping[str, Sequence[Recording]]) -> str:
    """Tell what of the published recordings is not there; "" where nothing is missing."""
    found = {split: len(recordings.get(split, ())) for split in source.recordings}
    return ", ".join(
        f"{split} has {found[split] or 'none'} of {number:,} recordings"
        for split, number in source.recordings.items()
        if found[split] < number
    )


def build_dataset_card(
    source: Source,
    recordings: Mapping[str, Sequence[Recording]],
    infos: Mapping[str, datasets.DatasetInfo],
    repo_id: str | None = None,
) -> str:
    """Write the card: a YAML header that `datasets` and the Hub read, then Markdown.

    Args:
        source: an entry of `SOURCES`.
        recordings: of each split.
        infos: config -> features, and splits with their number of rows; the first config is the default one.
        repo_id: Hub id, for the example.
    """
    columns = dict.fromkeys(column for info in infos.values() for column in info.features)
    described = "\n".join(f"| `{name}` | {COLUMNS[name]} |" for name in columns)
    figure = f"![Cycles by class and split, and their durations]({FIGURE})"
    sections = {
        "Use": _usage(repo_id or "path/to/this/folder"),
        "Content": "\n\n".join([_completeness(source, recordings), _table(recordings), _patients(recordings), figure]),
        "Columns": f"| column | |\n|---|---|\n{described}\n\nWhat is not known is null.",
        "Traps": "\n".join(f"- {trap}" for trap in source.traps),
        "Source and terms": f"{source.terms} Reference: {source.reference}."
        + (f"\n\n```bibtex\n{source.citation}\n```" if source.citation else ""),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    header = _header(source, infos).to_yaml()
    return f"---\n{header}\n---\n\n# {source.title}\n\n{source.summary}\n\n{body}\n"


def _header(source: Source, infos: Mapping[str, datasets.DatasetInfo]) -> DatasetCardData:
    default = next(iter(infos))
    header = DatasetCardData(
        pretty_name=source.title,
        license=source.licence,
        license_name=source.licence_name,
        license_link=source.licence_link,
        annotations_creators=[source.annotators],
        task_categories=["audio-classification"],
        size_categories=[_size(sum(split.num_examples for split in infos[default].splits.values()))],
        source_datasets=["original"],
        tags=["respiratory-sounds", "lung-sounds", "auscultation", "medical"],
    )
    DatasetInfosDict(infos).to_dataset_card_data(header)
    configs = {
        config: {
            "data_files": [{"split": split, "path": f"{config}/{split}-*"} for split in info.splits],
            **({"default": True} if config == default else {}),
        }
        for config, info in infos.items()
    }
    MetadataConfigs(configs).to_dataset_card_data(header)
    return header


def _size(rows: int) -> str:
    bounds = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K"}
    return next((name for bound, name in bounds.items() if rows < bound), "100K<n<1M")


def _usage(place: str) -> str:
    return f"""\
```python
import io

import datasets
import soundfile

cycles = datasets.load_dataset("{place}")  # one row per respiratory cycle or event
recordings = datasets.load_dataset("{place}", "recordings")  # one row per recording

# Decoding takes torchcodec; the bytes do not.
cycles = cycles.cast_column("audio", datasets.Audio(decode=False))
samples, rate = soundfile.read(io.BytesIO(cycles["train"][0]["audio"]["bytes"]))
```"""


def _completeness(source: Source, recordings: Mapping[str, Sequence[Recording]]) -> str:
    if not source.recordings:
        return "Made by the generator's defaults, seed 0."
    missing = incomplete(source, recordings)
    return f"**Not complete: {missing}.**" if missing else "Every published recording is here."


def _classes(recordings: Mapping[str, Sequence[Recording]]) -> tuple[list[str], dict[str, Counter]]:
    """The four classes, "no label" if there are such cycles, and the cycles of each by split."""
    counts = {
        split: Counter(cycle.label or _UNLABELLED for recording in part for cycle in recording.cycles)
        for split, part in recordings.items()
    }
    return [*LABELS, *([_UNLABELLED] if any(count[_UNLABELLED] for count in counts.values()) else [])], counts


def _table(recordings: Mapping[str, Sequence[Recording]]) -> str:
    classes, counts = _classes(recordings)
    header = ["split", "patients", "recordings", "cycles", *classes]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for split, part in recordings.items():
        patients = {recording.patient_id for recording in part}
        numbers = [len(patients), len(part), counts[split].total(), *(counts[split][name] for name in classes)]
        lines.append(f"| `{split}` | " + " | ".join(f"{number:,}" for number in numbers) + " |")
    return "\n".join(lines)


def _patients(recordings: Mapping[str, Sequence[Recording]]) -> str:
    patients = {split: {recording.patient_id for recording in part} for split, part in recordings.items()}
    train = patients.pop("train", set())
    shared = {split: len(train & others) for split, others in patients.items()}
    listed = ", ".join(f"{number or 'none'} of `{split}`" for split, number in shared.items())
    return f"Patients who are in `train` too: {listed}."


def draw_cycles(recordings: Mapping[str, Sequence[Recording]], path: Path, title: str) -> None:
    """Draw the cycles of each class (left) and their durations in seconds (right), by split, as PNG."""
    classes, counts = _classes(recordings)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    bars, histogram = figure.subplots(1, 2)
    width = 0.8 / len(recordings)
    longest = max(duration for part in recordings.values() for duration in _durations(part))
    for number, ((split, part), colour) in enumerate(zip(recordings.items(), _COLOURS, strict=False)):
        places = [place + (number - (len(recordings) - 1) / 2) * width for place in range(len(classes))]
        drawn = bars.bar(places, [counts[split][name] for name in classes], width, color=colour, label=split)
        bars.bar_label(drawn, fmt="{:,.0f}", fontsize=7)
        histogram.hist(_durations(part), bins=40, range=(0, longest), histtype="step", color=colour, linewidth=1.5)
    bars.set_xticks(range(len(classes)), classes)
    bars.set_ylabel("cycles")
    bars.legend(frameon=False)
    histogram.set_xlabel("duration in seconds")
    for axes in (bars, histogram):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    figure.savefig(path, dpi=150)


def _durations(recordings: Sequence[Recording]) -> list[float]:
    return [cycle.end - cycle.start for recording in recordings for cycle in recording.cycles]
