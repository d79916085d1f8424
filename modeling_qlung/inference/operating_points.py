"""What a checkpoint's thresholds did on its validation patients: `operating_points.json` beside the weights."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

FILE_NAME = "operating_points.json"
RATES = ("sensitivity", "specificity")


@dataclass(frozen=True, eq=False)
class OperatingPoints:
    """
    Sensitivity and specificity at each threshold of P(abnormal), as measured on a checkpoint's validation patients.

    Args:
        about: a sentence on whom the model was trained, and on whom it was measured.
        window: length of the windows that were scored, in s.
        hop: from one window to the next, in s.
        threshold: of P(abnormal), chosen on these patients.
        quality_threshold: of the recording's quality, below which nothing is said.
        patients: how many there were.
        recordings: how many recordings, `{"abnormal": ..., "normal": ...}`.
        cycles: how many annotated cycles or events, by the same names.
        thresholds: ascending, within [0, 1].
        by_recording: `{"sensitivity": [...], "specificity": [...]}`, one value per threshold; a recording was called
            abnormal where at least one span was marked.
        by_cycle: the same for the cycles or events that were annotated in them, each scored as `LungSoundAnalyzer`
            scores cycles that it is given.
        level: RMS amplitude that recordings were brought to; None where they were left as they are.
        scores: what was found at `threshold`, first on these patients, then elsewhere: each `{"of": ..., "recordings":
            {"abnormal": 108, "normal": 255, "AUROC": [value, low, high], "sensitivity": ..., "specificity": ...},
            "cycles": {...}, "gates": {...}}`, shares in [0, 1] with 95 % intervals by patient, None where there are too
            few patients; of the gate by quality, by the name of what was gated, shares without intervals: `{"coverage":
            0.9, "risk": 0.3, "selective_risk": 0.29, "selective_risk_confidence": ..., "aurc_quality": ...,
            "aurc_confidence": ...}`, and nothing where the checkpoint measures no quality.

    Raises:
        ValueError: if the thresholds do not ascend, or a list has another length.
    """

    about: str
    window: float
    hop: float
    threshold: float
    quality_threshold: float
    patients: int
    recordings: dict[str, int]
    cycles: dict[str, int]
    thresholds: list[float]
    by_recording: dict[str, list[float]]
    by_cycle: dict[str, list[float]]
    level: float | None
    scores: list[dict[str, Any]]

    def __post_init__(self):
        if len(self.thresholds) < 2 or self.thresholds != sorted(set(self.thresholds)):
            raise ValueError(f"thresholds are {self.thresholds!r:.60}; give two or more in ascending order.")
        for name in ("by_recording", "by_cycle"):
            for rate in RATES:
                found = len(getattr(self, name)[rate])
                if found != len(self.thresholds):
                    raise ValueError(f"{name}.{rate} has {found} values for {len(self.thresholds)} thresholds.")

    @classmethod
    def from_file(cls, path: str | Path) -> "OperatingPoints":
        """Read `operating_points.json`; further keys are left alone.

        Raises:
            ValueError: if it is not such a file; the message names it and what is wrong.
        """
        try:
            content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{known.name: content[known.name] for known in fields(cls)})
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}: write it again with the evaluation's operating points.") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no operating points: {error}") from error

    def at(self, threshold: float) -> dict[str, dict[str, float]]:
        """Give the rates at a threshold, between those of the table interpolated linearly.

        Returns:
            `{"recordings": {"sensitivity": ..., "specificity": ...}, "cycles": {...}}`, in [0, 1].
        """
        tables = {"recordings": self.by_recording, "cycles": self.by_cycle}
        return {
            name: {rate: float(np.interp(threshold, self.thresholds, table[rate])) for rate in RATES}
            for name, table in tables.items()
        }
