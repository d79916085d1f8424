import json

import numpy as np
import pandas as pd
import pytest
import yaml

from modeling_qlung.evaluation import benchmark
from modeling_qlung.evaluation.benchmark import Group, compare, read_row, sensitivities, write_benchmark
from modeling_qlung.evaluation.bootstrap import bootstrap_ci, paired_difference_ci
from modeling_qlung.evaluation.report import read_predictions, score_predictions, write_metrics, write_predictions
from modeling_qlung.evaluation.tasks import TASKS
from modeling_qlung.training.arguments import complete_options

PATIENTS, CYCLES = 12, 8
SEEDS = (1, 2, 3)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(benchmark, "RESAMPLES", 200)


def predicted(seed, skill, split="test", classes=4, patients=range(PATIENTS), unlabelled=2):
    """Rows of predictions.parquet: a patient's labels are the same for every seed and skill."""
    rng = np.random.default_rng([seed, int(1000 * skill)])
    rows = []
    for patient in patients:
        truth = np.random.default_rng(patient).integers(0, classes, CYCLES)
        for cycle, label in enumerate(truth.tolist()):
            guess = label if rng.random() < skill else int(rng.integers(classes))
            rows.append(row(split, patient, cycle, label, guess))
    return rows + [row(split, patients[0], CYCLES + n, None, 0) for n in range(unlabelled)]


def row(split, patient, cycle, label, prediction):
    return {
        "row_id": f"{patient}_recording:{cycle}",
        "patient_id": f"p{patient}",
        "split": split,
        "label": label,
        "prediction": prediction,
        "logits": [0.0, 0.5],
        "quality": None,
    }


def make_run(folder, rows, options=None, about=None, flatness=None, seed=1, ended=True):
    folder.mkdir(parents=True)
    content = {"about": {"recipe": "a-recipe", **(about or {})}, **(options or {}), "seed": seed}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
    write_predictions(folder / "predictions.parquet", rows)
    if flatness is not None:
        (folder / "flatness.json").write_text(json.dumps(flatness))
    if ended:
        task = TASKS[(options or {}).get("task", "4-class")]
        metrics = score_predictions(read_predictions(folder / "predictions.parquet"), task, resamples=20)
        write_metrics(folder / "metrics.json", metrics)


def make_row(folder, skill, seeds=SEEDS, options=None, **kwargs):
    for seed in seeds:
        flatness = {"increase_gradient": seed / 10, "top_eigenvalue": 10.0 * seed}
        make_run(folder / f"seed_{seed}", predicted(seed, skill), options, flatness=flatness, seed=seed, **kwargs)


def cells(markdown, start):
    """The first table line that begins so, as a dict by heading."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown.splitlines() if "|" in line]
    line = next(line for line in lines if line[0].startswith(start))
    heading = next(heading for heading in lines[lines.index(line) :: -1] if heading[0] == "row")
    return dict(zip(heading, line, strict=True))


PUBLISHED = {
    "published": {"specificity": 81.9, "score_4class": "62.01 ± 1.18"},
    "source": "QLung (arXiv 2606.11915)",
    "selection": "best epoch on the test set",
}


@pytest.fixture
def two_rows(tmp_path):
    make_row(tmp_path / "ce", 0.5, options={"loss": "cross_entropy", "select_on": "last"})
    make_row(tmp_path / "qlung", 0.8, options={"head": "linear"}, about=PUBLISHED)
    return tmp_path


def test_table_gives_what_the_runs_scored(two_rows):
    markdown = write_benchmark(two_rows, ["ce", "qlung"], complete_options)
    assert (two_rows / "table.md").read_text(encoding="utf-8") == markdown
    line, frame = cells(markdown, "`qlung`"), pd.read_csv(two_rows / "table.csv").set_index(["row", "score"])
    scores = [
        json.loads((two_rows / f"qlung/seed_{seed}/metrics.json").read_text())["test"]["score_4class"] for seed in SEEDS
    ]
    assert line["Score (4-class)"] == f"{np.mean(scores):.2f} ± {np.std(scores, ddof=1):.2f}"
    assert line["seeds"] == "3"
    assert line["epoch"] == "validation patients"
    assert cells(markdown, "`ce`")["epoch"] == "last epoch"
    csv = frame.loc[("qlung", "score_4class")]
    assert csv[["mean", "sd", "n"]].tolist() == pytest.approx([np.mean(scores), np.std(scores, ddof=1), 3])

    labelled = [row for row in predicted(1, 0.8) if row["label"] is not None]
    order = sorted(range(len(labelled)), key=lambda index: labelled[index]["row_id"])
    labels, patients = ([labelled[i][key] for i in order] for key in ("label", "patient_id"))
    ours, theirs = ([[predicted(s, skill)[i]["prediction"] for i in order] for s in SEEDS] for skill in (0.8, 0.5))
    expected = paired_difference_ci(labels, ours, theirs, patients, resamples=200)
    for score, difference in expected.items():
        found = frame.loc[("qlung", score)]
        assert found[["difference", "difference_low", "difference_high"]].tolist() == pytest.approx(
            [difference.value, *difference.interval]
        )
        assert bool(found["excludes_zero"]) is difference.excludes_zero
        interval = bootstrap_ci(labels, ours, patients, resamples=200)[score]
        assert found[["low", "high"]].tolist() == pytest.approx(interval)
    headline = expected["score_4class"]
    assert headline.excludes_zero
    assert line["Δ Score (4-class) to ce"] == f"{headline.value:+.2f}"
    assert line["95 % of Δ"] == "{:+.2f} to {:+.2f}".format(*headline.interval)
    assert line["excludes 0"] == "yes"
    assert cells(markdown, "`ce`")["excludes 0"] == "–"


def test_published_row_stands_beneath_ours_with_its_source(two_rows):
    markdown = write_benchmark(two_rows, ["ce", "qlung"], complete_options)
    lines = markdown.splitlines()
    ours = next(index for index, line in enumerate(lines) if line.startswith("| `qlung`"))
    assert lines[ours + 1].startswith("| *qlung, published*")
    line = cells(markdown, "*qlung, published*")
    assert line["changed, or source"] == "QLung (arXiv 2606.11915)"
    assert line["epoch"] == "best epoch on the test set"
    assert (line["Sp"], line["Score (4-class)"], line["Score (2-class)"]) == ("81.90", "62.01 ± 1.18", "–")
    frame = pd.read_csv(two_rows / "table.csv").set_index(["row", "score"])
    assert frame.loc[("qlung", "score_4class")][["published", "published_sd"]].tolist() == [62.01, 1.18]
    assert frame.loc[("qlung", "score_2class")][["published", "source"]].isna().all()


def test_notes_say_who_was_tested_and_how_much_was_compared(two_rows):
    markdown = write_benchmark(two_rows, ["ce", "qlung"], complete_options)
    assert f"Tested on {PATIENTS * CYCLES} items of {PATIENTS} patients; 2 without a label" in markdown
    assert "- Comparisons of a headline score: 1, without correction" in markdown
    assert "a 4-class and a 2-class score are not comparable" in markdown
    assert "unfinished" not in markdown
    assert "head angular → linear, loss cross_entropy → qlung, select_on last → validation" in ", ".join(
        sorted(cells(markdown, "`qlung`")["changed, or source"].split(", "))
    )


def test_rows_on_part_of_a_dataset_say_so(two_rows):
    part = {"allow_missing_audio": True}
    make_run(two_rows / "part" / "seed_1", predicted(1, 0.6, patients=range(4)), part, PUBLISHED)
    markdown = write_benchmark(two_rows, ["ce", "part"], complete_options)
    assert "Tested on 96 items of 12 patients; 2 without a label in this task, not scored (ce)." in markdown
    assert "Tested on 32 items of 4 patients" in markdown
    assert "part of the dataset only, so published scores are of other items (part)." in markdown


def test_flatness_is_shown_where_it_was_measured(two_rows):
    make_run(two_rows / "bare" / "seed_1", predicted(1, 0.6))
    markdown = write_benchmark(two_rows, ["ce", "qlung", "bare"], complete_options)
    assert cells(markdown, "`ce`")["Top Hessian eigenvalue"] == "20 ± 10"
    assert cells(markdown, "`bare`")["Top Hessian eigenvalue"] == "–"
    assert "the same, relative to the weights" not in markdown
    frame = pd.read_csv(two_rows / "table.csv").set_index(["row", "score"])
    assert frame.loc[("ce", "increase_gradient")][["split", "mean", "n"]].tolist() == ["train", pytest.approx(0.2), 3]


def test_another_baseline_can_be_named(two_rows):
    markdown = write_benchmark(two_rows, ["ce", "qlung"], complete_options, baseline="qlung")
    assert cells(markdown, "`ce`")["Δ Score (4-class) to qlung"].startswith("−")
    assert cells(markdown, "`qlung`")["changed, or source"] == "baseline"
    with pytest.raises(ValueError, match="the baseline 'other' is none of the rows ce, qlung"):
        write_benchmark(two_rows, ["ce", "qlung"], complete_options, baseline="other")


def test_tasks_share_no_table_and_are_not_compared(two_rows):
    rows = predicted(1, 0.9, classes=2)
    make_run(two_rows / "binary" / "seed_1", rows, {"task": "two-output"})
    make_run(two_rows / "events" / "seed_1", rows, {"task": "1-1", "dataset": "sprsound"})
    markdown = write_benchmark(two_rows, ["ce", "qlung", "binary", "events"], complete_options)
    headings = [line for line in markdown.splitlines() if line.startswith("###")]
    assert headings == ["### icbhi test, 4-class", "### icbhi test, two-output", "### sprsound test, 1-1"]
    assert "Score (4-class)" not in cells(markdown, "`binary`")
    assert "Score (two-output)" not in cells(markdown, "`ce`")
    assert {"AS", "HS", "SE", "SP"} <= cells(markdown, "`events`").keys()
    assert "binary is not compared: ce is of the task 4-class." in markdown
    assert "events is not compared: ce was not tested on sprsound test." in markdown
    assert cells(markdown, "`binary`")["excludes 0"] == "–"
    frame = pd.read_csv(two_rows / "table.csv").set_index("row")
    assert frame.loc["binary"]["difference"].isna().all()


@pytest.mark.parametrize("change", ["items", "labels"])
def test_rows_with_other_items_or_labels_are_not_compared(two_rows, change):
    rows = predicted(1, 0.9)
    if change == "items":
        rows = rows[1:]
    else:
        rows[0]["label"] = (rows[0]["label"] + 1) % 4
    make_run(two_rows / "odd" / "seed_1", rows)
    markdown = write_benchmark(two_rows, ["ce", "odd"], complete_options)
    assert "odd is not compared: ce was tested on other items or labels." in markdown
    assert "headline score: 0, without" in markdown


def test_unfinished_rows_are_shown_with_what_is_there(two_rows):
    make_row(two_rows / "half", 0.6, seeds=(1, 3))
    make_run(two_rows / "half" / "seed_2", predicted(2, 0.6), ended=False)
    markdown = write_benchmark(two_rows, ["ce", "qlung", "half", "later"], complete_options)
    assert cells(markdown, "`half`")["seeds"] == "2"
    assert "`half` is unfinished: of the seeds 1, 2, 3, ended: 1, 3." in markdown
    assert "`later` is unfinished: of the seeds 1, 2, 3, ended: none." in markdown
    with pytest.raises(ValueError, match="no run of later has ended"):
        write_benchmark(two_rows, ["later"], complete_options)


def test_folds_of_a_seed_are_scored_together(tmp_path):
    parts = [range(0, 5), range(5, PATIENTS)]
    for seed in SEEDS:
        make_run(tmp_path / "whole" / f"seed_{seed}", predicted(seed, 0.7, unlabelled=0), seed=seed)
        every = predicted(seed, 0.7, unlabelled=0)
        for fold, patients in enumerate(parts):
            rows = [row for row in every if int(row["patient_id"][1:]) in patients]
            validation = predicted(seed, 0.9, "validation", patients=range(20, 24))
            folder = tmp_path / "folds" / f"fold_{fold}" / f"seed_{seed}"
            make_run(folder, rows + validation, {"fold": fold}, seed=seed, ended=(seed, fold) != (3, 1))
    whole, folds = (read_row(tmp_path / name, complete_options) for name in ("whole", "folds"))
    assert (folds.seeds, folds.folds, list(folds.splits)) == ([1, 2], 2, ["test"])
    pd.testing.assert_frame_equal(folds.splits["test"].items, whole.splits["test"].items)
    np.testing.assert_array_equal(folds.splits["test"].predictions, whole.splits["test"].predictions[:2])
    assert "not the mean over folds" in write_benchmark(tmp_path, ["whole", "folds"], complete_options)


def test_figures_are_drawn_and_named_in_the_table(two_rows):
    for share in (0.0, 1.0):
        make_row(two_rows / f"qlung,quality_share={share}", 0.6, options={"head": "linear", "quality_share": share})
    names = ["ce", "qlung", "qlung,quality_share=0.0", "qlung,quality_share=1.0"]
    markdown = write_benchmark(two_rows, names, complete_options)
    figures = {path.name for path in two_rows.glob("*.png")}
    assert figures == {
        "scores_icbhi_test_4-class.png",
        "confusion_icbhi_test_4-class.png",
        "sensitivity_quality_share_icbhi_test_4-class_qlung.png",
    }
    assert all(f"]({name})" in markdown for name in figures)


def test_sensitivity_knows_defaults_and_wants_all_else_equal(two_rows):
    # The loss's own 0.5, which no recipe names, is one of the values; a row with another loss is none.
    for share in (0.0, 1.0):
        make_row(two_rows / f"share-{share}", 0.6, seeds=(1,), options={"head": "linear", "quality_share": share})
    make_row(two_rows / "other", 0.6, seeds=(1,), options={"head": "linear", "quality_share": 0.2, "scale": 30.0})
    rows = [read_row(two_rows / name, complete_options) for name in ("ce", "share-1.0", "qlung", "share-0.0", "other")]
    ((option, varied),) = sensitivities(compare(rows, "ce"))
    assert option == "quality_share"
    assert [result.row.name for result in varied] == ["share-0.0", "qlung", "share-1.0"]
    assert [result.row.options[option] for result in varied] == [0.0, 0.5, 1.0]
    assert {result.group for result in varied} == {Group("icbhi", "test", "4-class")}


def test_published_scores_of_several_splits_name_theirs(tmp_path):
    rows = predicted(1, 0.7, "test_intra") + predicted(1, 0.7, "test_inter")
    nested = {"published": {"test_inter": {"score_4class": 50}}, "source": "a paper"}
    make_run(tmp_path / "nested" / "seed_1", rows, about=nested)
    make_run(tmp_path / "flat" / "seed_1", rows, about={"published": {"score_4class": 50}})
    markdown = write_benchmark(tmp_path, ["nested", "flat"], complete_options)
    assert markdown.count("nested, published") == 1
    assert markdown.index("icbhi test_inter") < markdown.index("nested, published")
    assert "`flat`: its published scores do not say which of test_intra, test_inter they are of." in markdown


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"options": {"rho": 0.1}}, "seed_2/recipe.yaml has other options than .*seed_1"),
        ({"rows": predicted(2, 0.5)[1:]}, "row, test: the seeds were tested on different items or labels"),
        ({"rows": predicted(2, 0.5, "test_inter")}, "the seeds were tested on different items"),
        ({"about": {"published": {"accuracy": 50}}}, "row: published 'accuracy' is no score of the task 4-class"),
    ],
)
def test_runs_that_do_not_fit_are_named(tmp_path, second, message):
    make_run(tmp_path / "row" / "seed_1", predicted(1, 0.5))
    make_run(tmp_path / "row" / "seed_2", **{"rows": predicted(2, 0.5), "seed": 2, **second})
    with pytest.raises(ValueError, match=message):
        write_benchmark(tmp_path, ["row"], complete_options)


def test_overlapping_folds_are_refused(tmp_path):
    for fold in range(2):
        make_run(tmp_path / "row" / f"fold_{fold}" / "seed_1", predicted(1, 0.5))
    with pytest.raises(ValueError, match="predicted twice with one seed; do its folds overlap"):
        read_row(tmp_path / "row", complete_options)
