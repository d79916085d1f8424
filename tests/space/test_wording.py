"""What the page says of an analysis."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import wording

from modeling_qlung.inference import Analysis, OperatingPoints
from tests.space.conftest import save_checkpoint

CLASSES = ["normal", "crackle", "wheeze", "both"]
N, C, W, B = np.eye(4) * 0.6 + 0.1


def analysis(*rows: np.ndarray, **fields: Any) -> Analysis:
    """Steps of 0.5 s, or cycles of them."""
    edges = 0.5 * np.stack([np.arange(len(rows)), np.arange(1, len(rows) + 1)], axis=1)
    values: dict[str, Any] = {
        "duration": 0.5 * len(rows),
        "classes": CLASSES,
        "normal": 0,
        "edges": edges,
        "probabilities": np.array(rows),
        "threshold": 0.5,
        "cycles": False,
        "quality": 0.9,
        "reasons": [],
        "quality_parts": [],
        "can_tell": True,
    }
    return Analysis(**{**values, **fields})


@pytest.mark.parametrize(
    ("rows", "fields", "said"),
    [
        ([N, N], {}, "Nothing abnormal was marked in 1.0 s."),
        ([N, C, C], {}, "Crackles were marked in 1 place, 1.0 s of 1.5 s."),
        ([C, N, C, C], {}, "Crackles were marked in 2 places, 1.5 s of 2.0 s."),
        ([W, N, C, B], {}, "Crackles were marked in 1 place, 0.5 s; wheezes in 1 place, 0.5 s; "
         "crackles with wheezes in 1 place, 0.5 s; of 2.0 s in all."),
        ([C, C, N], {"cycles": True}, "Crackles were marked in 2 of 3 annotated cycles."),
        ([N], {"cycles": True}, "Nothing abnormal was marked in 1 annotated cycle."),
        (
            [C],
            {"can_tell": False, "reasons": ["mains hum"]},
            "I can’t tell: the recording is too poor, or unlike those I know (mains hum).",
        ),
        ([C], {"can_tell": False}, "I can’t tell: the recording is too poor, or unlike those I know."),
    ],
)  # fmt: skip
def test_verdict(rows, fields, said):
    assert wording.verdict(analysis(*rows, **fields)) == said


def test_nothing_marked_is_not_called_healthy():
    assert "does not mean that the lungs are healthy" in wording.caution(analysis(N))
    assert "Do not rely on it: record again, in a quiet room." in wording.caution(analysis(C, can_tell=False))
    silent = wording.caution(analysis(N, can_tell=False, reasons=["too quiet"]))
    assert silent == "That nothing is marked says nothing: record again, with the microphone on and held to the skin."
    clipped = analysis(C, can_tell=False, reasons=["speech or crying", "clipped"])
    assert "record again, at a lower level." in wording.caution(clipped)


def test_quality_names_its_reasons():
    assert wording.quality(analysis(N)) == "Recording quality 0.90 of 1."
    noticed = wording.quality(analysis(N, reasons=["mains hum"]))
    assert noticed == "Recording quality 0.90 of 1. Noticed: mains hum."
    assert wording.quality(analysis(N, quality=0.07, can_tell=False)) == (
        "Recording quality 0.07 of 1; no single cause stands out."
    )
    assert wording.quality(analysis(N, quality=None, reasons=["clipped", "mains hum"])) == (
        "This model does not judge recordings’ quality. Noticed: clipped, mains hum."
    )


def test_operating_point_says_on_whom_and_between_the_tables_lines(tmp_path):
    points = OperatingPoints.from_file(save_checkpoint(tmp_path) / "operating_points.json")
    said = wording.operating_point(points, 0.75)
    assert said.startswith("At 0.75, on 50 validation patients: of 120 recordings with an abnormal sound 40 % were")
    assert "of 1,260 without one 85 % were left unmarked" in said
    assert said.endswith("sensitivity 20 % of 300, specificity 42 % of 900.")
    assert "does not say" in wording.operating_point(None, 0.5)
    assert json.loads((tmp_path / "operating_points.json").read_text())["patients"] == 50


def test_how_well_it_told_each_group_is_said(tmp_path):
    points = OperatingPoints.from_file(save_checkpoint(tmp_path) / "operating_points.json")
    assert wording.evidence(points) == ""
    scores = [
        {"of": name, "recordings": {"AUROC": [value, None, None]}}
        for name, value in (("patients kept apart", 0.772), ("icbhi:test", 0.333), ("one class", None))
    ]
    said = wording.evidence(replace(points, scores=scores))
    assert "less is no use) in: 77 % of patients kept apart, 33 % of ICBHI’s test." in said
