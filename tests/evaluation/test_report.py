import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_qlung.evaluation import icbhi_scores
from modeling_qlung.evaluation.report import (
    format_interval,
    format_mean_sd,
    format_scores,
    format_table,
    read_predictions,
    score_predictions,
    summarize_seeds,
    write_metrics,
    write_predictions,
)
from modeling_qlung.evaluation.tasks import FOUR_CLASS


def row(number=0, split="test", **changes):
    return {
        "row_id": f"101_1b1_Al_sc_Meditron:{number}",
        "patient_id": f"{101 + number % 5}",
        "split": split,
        "label": number % 4,
        "prediction": (number * 7 % 5) % 4,
        "logits": [0.25 * number, -1.5, 0.0, 3.0],
        "quality": 0.5,
    } | changes


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "predictions.parquet"
    rows = [
        row(0, label=np.int64(3), logits=np.array([1.5, -2.0, 0.25, 0.0], dtype=np.float32)),
        row(1, label=None, quality=None),
        row(0, split="validation"),
    ]
    write_predictions(path, rows)
    table = read_predictions(path)
    assert list(table.columns) == ["row_id", "patient_id", "split", "label", "prediction", "logits", "quality"]
    assert table["row_id"].tolist() == [f"101_1b1_Al_sc_Meditron:{n}" for n in (0, 1, 0)]
    assert table["label"].tolist() == [3, pd.NA, 0]
    assert table["label"].dtype == "Int64"
    assert table["logits"][0].tolist() == [1.5, -2.0, 0.25, 0.0]
    assert table["quality"].isna().tolist() == [False, True, False]
    assert pq.read_schema(path).field("logits").type == pa.list_(pa.float32())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no predictions"),
        ([row(0), row(0)], "1 rows appear twice in one split, first '101_1b1_Al_sc_Meditron:0' in 'test'"),
        ([row(0, logits=[float("nan"), 0, 0, 0])], "'101_1b1_Al_sc_Meditron:0' has logits .*diverge"),
        ([row(0, speed=1)], r"missing or unknown columns \['speed'\]"),
        ([{k: v for k, v in row(0).items() if k != "quality"}], r"\['quality'\]"),
        ([row(0, patient_id=None)], "has no patient_id"),
    ],
)
def test_wrong_rows_are_named_and_not_written(tmp_path, rows, message):
    path = tmp_path / "predictions.parquet"
    with pytest.raises(ValueError, match=message) as error:
        write_predictions(path, rows)
    assert str(path) in str(error.value)
    assert not path.exists()


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"row_id": ["a"], "label": [0]}), path)
    with pytest.raises(ValueError, match=r"other\.parquet: columns"):
        read_predictions(path)


def test_splits_are_scored_apart_and_rows_without_label_only_counted(tmp_path):
    path = tmp_path / "predictions.parquet"
    test_rows = [row(n) for n in range(40)]
    unlabelled = [row(n, label=None, prediction=2) for n in range(40, 43)]
    validation_rows = [row(n, split="validation", prediction=n % 4) for n in range(40)]
    write_predictions(path, validation_rows + unlabelled + test_rows)
    metrics = score_predictions(read_predictions(path), resamples=200)
    assert list(metrics) == ["validation", "test"]
    expected = icbhi_scores([r["label"] for r in test_rows], [r["prediction"] for r in test_rows])
    assert {key: metrics["test"][key] for key in expected} == expected
    assert metrics["test"]["unlabelled"] == 3
    assert metrics["test"]["patients"] == 5
    assert metrics["validation"]["score_4class"] == 100
    assert metrics["validation"]["unlabelled"] == 0
    low, high = metrics["test"]["ci95"]["score_4class"]
    assert low <= expected["score_4class"] <= high
    assert metrics["validation"]["ci95"]["score_4class"] == [100, 100]


def test_a_split_without_labels_has_no_scores():
    metrics = score_predictions(pd.DataFrame([row(n, label=None) for n in range(3)]))["test"]
    assert metrics["unlabelled"] == 3
    assert {metrics[name] for name in FOUR_CLASS.titles} == {None}
    assert set(metrics["ci95"].values()) == {None}
    assert sum(metrics["support"].values()) == 0


def test_a_doubled_row_is_not_scored():
    with pytest.raises(ValueError, match="twice"):
        score_predictions(pd.DataFrame([row(0), row(1), row(1)]))


def test_metrics_file_is_json_with_nulls(tmp_path):
    path = tmp_path / "metrics.json"
    metrics = score_predictions(pd.DataFrame([row(n, label=1) for n in range(8)]), resamples=50)
    write_metrics(path, metrics)
    assert json.loads(path.read_text()) == metrics
    assert '"specificity": null' in path.read_text()
    with pytest.raises(ValueError, match="nan"):
        write_metrics(path, {"test": {"specificity": float("nan")}})


def run_of(score, split="test", **changes):
    return {split: dict.fromkeys(FOUR_CLASS.titles, score) | changes}


def test_seeds_have_mean_and_sample_deviation():
    summary = summarize_seeds([run_of(60.0), run_of(62.0), run_of(64.0, specificity=None)])
    assert summary["test"]["score_4class"] == {"mean": 62.0, "sd": 2.0, "n": 3, "values": [60.0, 62.0, 64.0]}
    assert summary["test"]["specificity"]["n"] == 2
    assert summary["test"]["specificity"]["mean"] == 61.0
    assert summary["test"]["specificity"]["sd"] == pytest.approx(2**0.5)
    assert summary["test"]["specificity"]["values"] == [60.0, 62.0, None]


def test_one_seed_has_no_deviation():
    one, undefined = (summarize_seeds([run_of(score)])["test"]["score_2class"] for score in (60.0, None))
    assert one == {"mean": 60.0, "sd": None, "n": 1, "values": [60.0]}
    assert undefined == {"mean": None, "sd": None, "n": 0, "values": [None]}


def test_runs_that_differ_in_splits_are_not_averaged():
    with pytest.raises(ValueError, match=r"run 1 scored the splits \['test_intra'\]"):
        summarize_seeds([run_of(60.0), run_of(60.0, split="test_intra")])
    with pytest.raises(ValueError, match="no runs"):
        summarize_seeds([])


def test_table_names_both_measures():
    summary = summarize_seeds([run_of(60.0, specificity=None), run_of(63.0, specificity=None)])
    header, rule, line = format_table({"qlung-ast": summary["test"]}, first_column="recipe").splitlines()
    assert header == "| recipe | runs | Sp | Se (4-class) | Score (4-class) | Se (2-class) | Score (2-class) |"
    assert rule.count("|") == header.count("|")
    assert line == "| qlung-ast | 2 | – " + "| 61.50 ± 2.12 " * 4 + "|"
    assert "| 60.00 |" in format_table(summarize_seeds([run_of(60.0)]))


def test_numbers_are_written_in_one_way():
    assert format_interval([60.1249, 63.4]) == "[60.12, 63.40]"
    assert format_interval([-0.5, 2.25], signed=True) == "[−0.50, +2.25]"
    assert format_interval(None) == "–"
    assert [format_mean_sd(*pair) for pair in ((62.012, 1.18), (62.012, None), (None, None))] == [
        "62.01 ± 1.18",
        "62.01",
        "–",
    ]
    assert format_mean_sd(0.01234, 123.4, ".3g") == "0.0123 ± 123"


def test_scores_of_one_model_stand_with_their_intervals():
    metrics = score_predictions(pd.DataFrame([row(n) for n in range(40)] + [row(40, label=None)]), resamples=50)
    low, high = metrics["test"]["ci95"]["score_4class"]
    metrics["test"]["ci95"]["specificity"] = None
    line = format_scores(metrics).splitlines()[2]
    assert line.startswith(f"| test | 40 (1 without label) | {metrics['test']['specificity']:.2f} | ")
    assert f"| {metrics['test']['score_4class']:.2f} [{low:.2f}, {high:.2f}] |" in line
