"""The `datasets` builders: one for each dataset, two configs each, Arrow tables out of `Recording`s.

The tables carry audio as bytes, which needs no torchcodec: `datasets` asks for it only to encode examples one by one
(as a `GeneratorBasedBuilder` does) or to decode them.

`datasets` replaces `Path`, `open`, `numpy` and parts of `os` in every module that defines a builder. So files are read
and sounds made in other modules.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import pyarrow as pa
from datasets import ClassLabel, Features, Value
from datasets.builder import Key

from . import icbhi, simulated, sprsound
from .audio import Wav, read_wav
from .labels import EVENT_TYPES, LABELS, RECORD_LABELS
from .recordings import Cycle, Recording, fingerprint, usable

CONFIGS = ("cycles", "recordings")
_EVENT_TYPE = ClassLabel(names=list(EVENT_TYPES))


@dataclass
class LungSoundConfig(datasets.BuilderConfig):
    """`allow_missing_audio`: work on the recordings that are there, with a warning that counts them."""

    allow_missing_audio: bool = False


class LungSoundBuilder(datasets.ArrowBasedBuilder, ABC):
    """Base of the builders. Config `cycles` has one row per cycle or event, `recordings` one per recording.

    Columns of both: `audio` (WAV bytes at the original rate and bit depth), `recording_id`, `patient_id`, `location`,
    `device`, `mode` ("sc" sequential, "mc" simultaneous), `age` (years), `sex` ("M", "F"), `bmi` (kg/m²) and the
    dataset's own. `cycles` adds `label`, `crackle`, `wheeze`, `cycle_index` (position in the annotation file), `start`
    and `end` (s); `recordings` adds the list `cycles` of these. What is not known is null.
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = LungSoundConfig
    RECORDING_COLUMNS: ClassVar[dict[str, Any]] = {}
    CYCLE_COLUMNS: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, config_name: str = "cycles", data_dir: str | None = None, cache_dir: str | None = None, **options: Any
    ) -> None:
        settings = self.BUILDER_CONFIG_CLASS(name=config_name, data_dir=data_dir, **options)
        # Everything is read and checked here, before `datasets` takes over: an error stays one plain error, and the
        # cache key covers what was found.
        splits, self.missing = usable(self.read(settings, cache_dir), settings.allow_missing_audio)
        if config_name == "cycles":  # recordings without cycles have no rows, and `datasets` cannot read an empty split
            splits = {split: kept for split, found in splits.items() if (kept := [r for r in found if r.cycles])}
        self.recordings = splits
        super().__init__(
            cache_dir=cache_dir,
            dataset_name=type(self).__name__,
            config_name=config_name,
            hash=fingerprint(self.recordings),
            data_dir=data_dir,
            **options,
        )

    @abstractmethod
    def read(self, settings: Any, cache_dir: str | None) -> dict[str, list[Recording]]:
        """Recordings of each split; those that lack their audio or annotation have `audio` None."""

    def wav(self, recording: Recording) -> Wav:
        """The recording's samples."""
        return read_wav(recording.audio)

    def _info(self) -> datasets.DatasetInfo:
        shared = {
            "recording_id": Value("string"),
            "patient_id": Value("string"),
            "location": Value("string"),
            "device": Value("string"),
            "mode": Value("string"),
            "age": Value("float64"),
            "sex": Value("string"),
            "bmi": Value("float64"),
            **self.RECORDING_COLUMNS,
        }
        marks = {
            "label": ClassLabel(names=list(LABELS)),
            "crackle": Value("bool"),
            "wheeze": Value("bool"),
            "start": Value("float64"),
            "end": Value("float64"),
        }
        if self.config.name == "cycles":
            own = {"cycle_index": Value("int32"), **self.CYCLE_COLUMNS}
            columns = {"audio": datasets.Audio(), **marks, **shared, **own}
        else:
            # One struct for every dataset, so that recordings of several can be put together.
            columns = {
                "audio": datasets.Audio(),
                **shared,
                "cycles": datasets.List({**marks, "event_type": _EVENT_TYPE}),
            }
        return datasets.DatasetInfo(description=self.missing, features=Features(columns))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        generators = []
        for split, recordings in self.recordings.items():
            generator = datasets.SplitGenerator(name=split, gen_kwargs={"split": split})
            rows = len(recordings) if self.config.name == "recordings" else sum(len(r.cycles) for r in recordings)
            generator.split_info.num_examples = rows  # the total of the progress bar
            generators.append(generator)
        return generators

    def _generate_tables(self, split: str) -> Iterator[tuple[Key, pa.Table]]:
        features = self.info.features
        rows_of = _cycle_rows if self.config.name == "cycles" else _recording_rows
        for index, recording in enumerate(self.recordings[split]):
            rows = [_encode(row, features) for row in rows_of(recording, self.wav(recording))]
            yield Key(0, index), pa.Table.from_pylist(rows, schema=features.arrow_schema)


class Icbhi(LungSoundBuilder):
    """ICBHI 2017: splits `train` and `test` (official, by recording: patients 156 and 218 are in both).

    Own columns: `diagnosis`, `fold` (0 to 4, RespireNet's patient-wise folds). `recording_id` is the name in the final
    database, whatever older name is on disk or in the split file.
    """

    RECORDING_COLUMNS: ClassVar[dict[str, Any]] = {"diagnosis": Value("string"), "fold": Value("int8")}

    def read(self, settings: LungSoundConfig, cache_dir: str | None) -> dict[str, list[Recording]]:
        """See `icbhi.read`."""
        return icbhi.read(settings.data_dir, cache_dir)


@dataclass
class SprsoundConfig(LungSoundConfig):
    """`continuous_as_wheeze`: label Rhonchi and Stridor as wheeze instead of leaving them without label."""

    continuous_as_wheeze: bool = False


class Sprsound(LungSoundBuilder):
    """SPRSound 2022: splits `train`, `test_intra` (children of the training set), `test_inter` (other children).

    Own columns: `record_label`, and `event_type` of cycles. `location` is p1 left posterior, p2 left lateral, p3 right
    posterior, p4 right lateral. The label follows from the event: Normal: normal; Fine and Coarse Crackle: crackle;
    Wheeze: wheeze; Wheeze+Crackle: both; Rhonchi and Stridor: null, and both flags too. "Poor Quality" recordings have
    no event: they are rows of `recordings` alone.
    """

    BUILDER_CONFIG_CLASS = SprsoundConfig
    RECORDING_COLUMNS: ClassVar[dict[str, Any]] = {"record_label": ClassLabel(names=list(RECORD_LABELS))}
    CYCLE_COLUMNS: ClassVar[dict[str, Any]] = {"event_type": _EVENT_TYPE}

    def read(self, settings: SprsoundConfig, cache_dir: str | None) -> dict[str, list[Recording]]:
        """See `sprsound.read`."""
        return sprsound.read(settings.data_dir, cache_dir, settings.continuous_as_wheeze, settings.allow_missing_audio)


@dataclass
class SimulatedConfig(LungSoundConfig):
    """`seed` and the numbers of patients and recordings; each recording has 5 cycles and depends on no other."""

    seed: int = 0
    train_patients: int = 20
    test_patients: int = 6
    recordings_per_patient: int = 4


class Simulated(LungSoundBuilder):
    """Simulated lung sounds: splits `train` and `test`, of different patients; 400 and 120 cycles, half of them normal.

    Own columns: `snr_db` (of the whole recording), and `event_type` of cycles, in SPRSound's names. Age, sex and BMI
    are drawn at random and tell nothing about the sounds.
    """

    BUILDER_CONFIG_CLASS = SimulatedConfig
    RECORDING_COLUMNS: ClassVar[dict[str, Any]] = {"snr_db": Value("float64")}
    CYCLE_COLUMNS: ClassVar[dict[str, Any]] = {"event_type": _EVENT_TYPE}

    def read(self, settings: SimulatedConfig, cache_dir: str | None) -> dict[str, list[Recording]]:
        """See `simulated.read`; it needs no `data_dir`."""
        if settings.data_dir is not None:
            raise ValueError(f"the simulated dataset reads no files: leave data_dir={settings.data_dir!r} out")
        sizes = {"train": settings.train_patients, "test": settings.test_patients}
        return simulated.read(settings.seed, sizes, settings.recordings_per_patient)

    def wav(self, recording: Recording) -> Wav:
        """Synthesise the recording from its plan."""
        return simulated.synthesize(recording.audio)


def _cycle_rows(recording: Recording, wav: Wav) -> list[dict[str, Any]]:
    rows = []
    for index, cycle in enumerate(recording.cycles):
        try:
            audio = wav.cut(cycle.start, cycle.end).to_bytes()
        except ValueError as error:
            raise ValueError(f"{cycle.source}: {error} ({recording.audio}): correct the times or the audio") from error
        path = f"{recording.recording_id}_{index}.wav"
        own = {"audio": {"bytes": audio, "path": path}, "cycle_index": index}
        rows.append({**own, **_shared(recording), **_marks(cycle)})
    return rows


def _recording_rows(recording: Recording, wav: Wav) -> list[dict[str, Any]]:
    audio = {"bytes": wav.to_bytes(), "path": f"{recording.recording_id}.wav"}
    return [{"audio": audio, **_shared(recording), "cycles": [_marks(cycle) for cycle in recording.cycles]}]


def _shared(recording: Recording) -> dict[str, Any]:
    return {"recording_id": recording.recording_id, "patient_id": recording.patient_id, **recording.metadata}


def _marks(cycle: Cycle) -> dict[str, Any]:
    return {
        "label": cycle.label,
        "crackle": cycle.crackle,
        "wheeze": cycle.wheeze,
        "start": cycle.start,
        "end": cycle.end,
        "event_type": cycle.event_type,
    }


def _encode(value: Any, feature: Any) -> Any:
    """Class names to their numbers, at any depth; what the features do not name is left out, what is lacking null."""
    if isinstance(feature, dict):
        return {name: _encode(value.get(name), inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List):
        return [_encode(item, feature.feature) for item in value]
    if isinstance(feature, ClassLabel) and value is not None:
        return feature.str2int(value)
    return value
