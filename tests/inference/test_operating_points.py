import json

import pytest

from modeling_qlung.inference import OperatingPoints

CONTENT = {
    "about": "50 children of the validation part",
    "window": 1.0,
    "hop": 0.25,
    "threshold": 0.35,
    "quality_threshold": 0.4,
    "patients": 50,
    "recordings": {"abnormal": 120, "normal": 260},
    "cycles": {"abnormal": 300, "normal": 900},
    "thresholds": [0.0, 0.5, 1.0],
    "by_recording": {"sensitivity": [1.0, 0.8, 0.0], "specificity": [0.0, 0.6, 1.0]},
    "by_cycle": {"sensitivity": [1.0, 0.7, 0.0], "specificity": [0.0, 0.9, 1.0]},
    "level": None,
    "scores": [],
}


def test_rates_between_those_of_the_table(tmp_path):
    (tmp_path / "points.json").write_text(json.dumps({**CONTENT, "further": 1}))
    points = OperatingPoints.from_file(tmp_path / "points.json")
    assert (points.threshold, points.patients, points.cycles["normal"]) == (0.35, 50, 900)
    assert points.at(0.5) == {
        "recordings": {"sensitivity": 0.8, "specificity": 0.6},
        "cycles": {"sensitivity": 0.7, "specificity": 0.9},
    }
    assert points.at(0.25)["recordings"] == pytest.approx({"sensitivity": 0.9, "specificity": 0.3})
    assert points.at(1.0)["cycles"] == {"sensitivity": 0.0, "specificity": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": [0.0, 1.0, 0.5]}, "ascending"),
        ({"thresholds": [0.0]}, "two or more"),
        ({"by_cycle": {"sensitivity": [1.0, 0.0], "specificity": [0.0, 0.9, 1.0]}}, r"by_cycle\.sensitivity has 2"),
        ({"by_cycle": {"sensitivity": [1.0, 0.5, 0.0]}}, "lacks 'specificity'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, change, message):
    path = tmp_path / "points.json"
    path.write_text(json.dumps({**CONTENT, **change}))
    with pytest.raises(ValueError, match=message) as raised:
        OperatingPoints.from_file(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(("text", "message"), [("{", "holds no"), ("[]", "holds no"), ("{}", "lacks 'about'")])
def test_a_file_of_something_else_is_named(tmp_path, text, message):
    (tmp_path / "points.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        OperatingPoints.from_file(tmp_path / "points.json")
