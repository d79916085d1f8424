"""Spans, summary and exports of an analysis that is written down by hand."""

import csv
import io
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from modeling_qlung.inference import Analysis, Span
from modeling_qlung.inference.analysis import QualityPart

PROBABILITIES = np.array(
    [
        # normal, crackle, wheeze
        [0.9, 0.1, 0.0],
        [0.4, 0.5, 0.1],
        [0.2, 0.6, 0.2],
        [0.1, 0.2, 0.7],
        [0.8, 0.1, 0.1],
        [0.5, 0.3, 0.2],
    ]
)
STEPS = np.array([[0.0, 0.5], [0.5, 1.0], [1.0, 1.5], [1.5, 2.0], [2.0, 2.5], [2.5, 2.75]])
ANALYSIS = Analysis(
    duration=2.75,
    classes=["normal", "crackle", "wheeze"],
    normal=0,
    edges=STEPS,
    probabilities=PROBABILITIES,
    threshold=0.5,
    cycles=False,
    quality=0.25,
    reasons=["clipped"],
    quality_parts=[QualityPart(0.0, 2.75, 0.25, ["clipped"])],
    can_tell=True,
)


def test_consecutive_steps_of_a_class_are_one_span():
    assert ANALYSIS.spans == [
        Span(0.5, 1.5, "crackle", pytest.approx(0.55), pytest.approx(0.8)),
        Span(1.5, 2.0, "wheeze", pytest.approx(0.7), pytest.approx(0.9)),
        Span(2.5, 2.75, "crackle", pytest.approx(0.3), pytest.approx(0.5)),
    ]
    assert ANALYSIS.summary == pytest.approx(
        {"abnormal": 0.9, "normal": 0.9, "crackle": 0.6, "wheeze": 0.7, "share_abnormal": 1.75 / 2.75}
    )


def test_each_marked_cycle_is_a_span_of_its_own():
    spans = replace(ANALYSIS, cycles=True).spans
    assert [(span.start, span.end) for span in spans] == [(0.5, 1.0), (1.0, 1.5), (1.5, 2.0), (2.5, 2.75)]


def test_the_normal_class_may_stand_anywhere():
    turned = replace(ANALYSIS, classes=["wheeze", "crackle", "normal"], normal=2, probabilities=PROBABILITIES[:, ::-1])
    assert turned.spans == ANALYSIS.spans


@pytest.mark.parametrize("cycles", [False, True])
def test_a_higher_threshold_never_marks_more(cycles):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1, 1], size=200)
    starts = np.arange(200) * 0.5
    analysis = replace(
        ANALYSIS,
        classes=["normal", "crackle", "wheeze", "both"],
        edges=np.stack([starts, starts + 0.5], axis=1),
        probabilities=probabilities,
        cycles=cycles,
    )
    marked = []
    for threshold in np.linspace(0, 1, 41):
        found = analysis.at(threshold)
        assert found.probabilities is analysis.probabilities
        assert found.threshold == threshold
        in_spans = sum(span.end - span.start for span in found.spans)
        assert in_spans == pytest.approx(0.5 * ((1 - probabilities[:, 0]) >= threshold).sum())
        assert found.summary["share_abnormal"] == pytest.approx(in_spans / 100)
        marked.append(in_spans)
    assert marked[0] == 100
    assert all(after <= before for before, after in pairwise(marked))
    assert marked[-1] < 1


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_is_a_probability(threshold):
    with pytest.raises(ValueError, match="threshold is"):
        ANALYSIS.at(threshold)


def test_json_and_csv_hold_what_is_there():
    content = json.loads(json.dumps(ANALYSIS.to_dict(), allow_nan=False))
    assert content["spans"][1] == {"start": 1.5, "end": 2.0, "label": "wheeze", "probability": 0.7, "peak": 0.9}
    assert content["edges"] == STEPS.tolist()
    assert content["probabilities"] == PROBABILITIES.tolist()
    assert content["quality_parts"] == [{"start": 0.0, "end": 2.75, "quality": 0.25, "reasons": ["clipped"]}]
    assert content["summary"]["abnormal"] == 0.9
    assert (content["duration"], content["threshold"], content["can_tell"]) == (2.75, 0.5, True)
    rows = list(csv.DictReader(io.StringIO(ANALYSIS.to_csv())))
    times = {"start_s": "0.500", "end_s": "1.500"}
    shares = {"probability": "0.5500", "peak": f"{ANALYSIS.spans[0].peak:.4f}"}
    assert rows[0] == {**times, "label": "crackle", **shares, "can_tell": "True"}
    assert len(rows) == 3
    assert ANALYSIS.at(1.0).to_csv() == "start_s,end_s,label,probability,peak,can_tell\n"
