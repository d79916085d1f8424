"""What was heard in a recording: probabilities over time, the spans marked at a threshold, and its quality."""

import csv
import io
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Span:
    """
    A stretch of a recording that is marked as abnormal.

    Args:
        start: in s.
        end: in s.
        label: the abnormal class.
        probability: mean over the span's steps of P(label), which may lie below the threshold: that is of P(abnormal).
        peak: largest P(abnormal) among them.
    """

    start: float
    end: float
    label: str
    probability: float
    peak: float


class QualityPart(NamedTuple):
    """Quality of a part of a recording, from `start` to `end` in s; None where the checkpoint measures none."""

    start: float
    end: float
    quality: float | None
    reasons: list[str]


@dataclass(frozen=True, eq=False)
class Analysis:
    """
    What [`LungSoundAnalyzer`] says of a recording.

    Args:
        duration: of the recording, in s.
        classes: of the model, in its order.
        normal: index of the normal class; P(abnormal) is 1 less its probability.
        edges: start and end of each step, or of each cycle that was given, in s, shape (steps, 2).
        probabilities: of each class in each step, shape (steps, classes).
        threshold: of P(abnormal), from which on a step is marked.
        cycles: whether the edges are those of given cycles, each of which is a span of its own.
        quality: of the recording in [0, 1], the mean over its parts, weighted by length; None where the checkpoint
            measures none.
        reasons: what may be wrong with it, of any part, most frequent first.
        quality_parts: the same of consecutive parts of 10 s, the last one of up to 20 s.
        can_tell: False where the quality is below the analyzer's threshold, and where there is no sound at all; the
            spans then mean nothing.
    """

    duration: float
    classes: list[str]
    normal: int
    edges: np.ndarray
    probabilities: np.ndarray
    threshold: float
    cycles: bool
    quality: float | None
    reasons: list[str]
    quality_parts: list[QualityPart]
    can_tell: bool

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it must be in [0, 1].")

    def at(self, threshold: float) -> "Analysis":
        """Give the same analysis with the spans of another threshold; the model is not asked again.

        Raises:
            ValueError: if the threshold is not in [0, 1].
        """
        return replace(self, threshold=threshold)

    @property
    def abnormal(self) -> np.ndarray:
        """P(abnormal) of each step, shape (steps,)."""
        return 1 - self.probabilities[:, self.normal]

    @property
    def marks(self) -> np.ndarray:
        """Each step's most probable abnormal class where P(abnormal) reaches the threshold, else -1; shape (steps,)."""
        others = np.array(self.probabilities)
        others[:, self.normal] = -1
        return np.where(self.abnormal >= self.threshold, others.argmax(axis=1), -1)

    @property
    def spans(self) -> list[Span]:
        """Consecutive steps marked as one class, in order; of given cycles, each marked one."""
        marks = self.marks
        first = np.ones(len(marks), dtype=bool)
        if not self.cycles:
            first[1:] = marks[1:] != marks[:-1]
        bounds = np.append(np.flatnonzero(first), len(marks))
        return [
            Span(
                start=float(self.edges[start, 0]),
                end=float(self.edges[end - 1, 1]),
                label=self.classes[marks[start]],
                probability=float(self.probabilities[start:end, marks[start]].mean()),
                peak=float(self.abnormal[start:end].max()),
            )
            for start, end in pairwise(bounds)
            if marks[start] >= 0
        ]

    @property
    def summary(self) -> dict[str, float]:
        """Of the recording: `abnormal` and each class, the largest over its steps; `share_abnormal`, of the time."""
        lengths = self.edges[:, 1] - self.edges[:, 0]
        return {
            "abnormal": float(self.abnormal.max()),
            **dict(zip(self.classes, self.probabilities.max(axis=0).tolist(), strict=True)),
            "share_abnormal": float(lengths[self.marks >= 0].sum() / lengths.sum()),
        }

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain values that `json.dumps` writes; times in s, all numbers to six places."""
        return {
            "duration": round(self.duration, 6),
            "classes": self.classes,
            "threshold": self.threshold,
            "can_tell": self.can_tell,
            "quality": None if self.quality is None else round(self.quality, 6),
            "reasons": self.reasons,
            "summary": {name: round(value, 6) for name, value in self.summary.items()},
            "spans": [
                {name: round(value, 6) if isinstance(value, float) else value for name, value in vars(span).items()}
                for span in self.spans
            ],
            "quality_parts": [
                {**part._asdict(), "quality": None if part.quality is None else round(part.quality, 6)}
                for part in self.quality_parts
            ],
            "edges": self.edges.round(6).tolist(),
            "probabilities": self.probabilities.round(6).tolist(),
        }

    def to_csv(self) -> str:
        """Give the spans as a table, a row each: `start_s,end_s,label,probability,peak` of [`Span`], and `can_tell`."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["start_s", "end_s", "label", "probability", "peak", "can_tell"])
        for span in self.spans:
            times = [f"{time:.3f}" for time in (span.start, span.end)]
            shares = [f"{share:.4f}" for share in (span.probability, span.peak)]
            writer.writerow([*times, span.label, *shares, self.can_tell])
        return table.getvalue()
