import json

import numpy as np
import pandas as pd
import pytest
import yaml

from modeling_qlung.evaluation import benchmark_results
from modeling_qlung.evaluation.benchmark import write_benchmark
from modeling_qlung.evaluation.benchmark_figures import sensitivities
from modeling_qlung.evaluation.benchmark_results import Group, compare
from modeling_qlung.evaluation.benchmark_rows import OFFICIAL, read_row
from modeling_qlung.evaluation.bootstrap import bootstrap_ci, paired_difference_ci
from modeling_qlung.evaluation.report import read_predictions, score_predictions, write_metrics, write_predictions
from modeling_qlung.evaluation.tasks import TASKS
from modeling_qlung.training.arguments import complete_options

PATIENTS, CYCLES = 12, 8
SEEDS = (1, 2, 3)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(benchmark_results, "RESAMPLES", 200)


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
        flatness = {"loss": 1.0, "increase_gradient": seed / 10, "top_eigenvalue": 10.0 * seed}
        make_run(folder / f"seed_{seed}", predicted(seed, skill), options, flatness=flatness, seed=seed, **kwargs)


def tabulate(folder, names, seeds=SEEDS, folds=(), **references):
    """The table of rows that are compared with the first where nothing else is said."""
    return write_benchmark(folder, {**dict.fromkeys(names, names[0]), **references}, complete_options, seeds, folds)


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
    markdown = tabulate(two_rows, ["ce", "qlung"])
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
    assert line["Δ Score (4-class)"] == f"{headline.value:+.2f} to `ce`"
    assert line["95 % of Δ"] == "[{:+.2f}, {:+.2f}]".format(*headline.interval)
    assert line["excludes 0"] == "yes"
    assert cells(markdown, "`ce`")["excludes 0"] == "–"


def test_published_row_stands_beneath_ours_with_its_source(two_rows):
    markdown = tabulate(two_rows, ["ce", "qlung"])
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
    markdown = tabulate(two_rows, ["ce", "qlung"])
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
    markdown = tabulate(two_rows, ["ce", "part"])
    assert "Tested on 96 items of 12 patients; 2 without a label in this task, not scored (`ce`)." in markdown
    assert "Tested on 32 items of 4 patients" in markdown
    assert "part of the dataset only, so published scores are of other items (`part`)." in markdown


def test_flatness_has_a_table_of_its_own(two_rows):
    make_run(two_rows / "bare" / "seed_1", predicted(1, 0.6))
    markdown = tabulate(two_rows, ["ce", "qlung", "bare"])
    scores, flatness = markdown.split("### Flatness")
    assert "eigenvalue" not in scores
    assert "`bare`" not in flatness.split("### Notes")[0]
    assert cells(flatness, "`ce`") == {
        "row": "`ce`",
        "runs": "3",
        "loss": "1 ± 0",
        "along the gradient": "0.2 ± 0.1",
        "largest found": "–",
        "relative to the weights": "–",
        "top eigenvalue": "20 ± 10",
    }
    frame = pd.read_csv(two_rows / "table.csv").set_index(["row", "score"])
    assert frame.loc[("ce", "increase_gradient")][["split", "mean", "n"]].tolist() == ["train", pytest.approx(0.2), 3]
    assert "### Flatness" not in tabulate(two_rows, ["bare"])


def test_each_row_is_compared_with_its_own_reference(two_rows):
    make_row(two_rows / "control", 0.6, options={"head": "linear", "quality_control": "constant"})
    markdown = tabulate(two_rows, ["ce", "qlung", "control"], ce="qlung", qlung="qlung", control="qlung")
    assert cells(markdown, "`ce`")["Δ Score (4-class)"].startswith("−")
    assert cells(markdown, "`ce`")["Δ Score (4-class)"].endswith(" to `qlung`")
    assert cells(markdown, "`qlung`")["changed, or source"] == "baseline"
    markdown = tabulate(two_rows, ["ce", "qlung", "control"], control="qlung")
    assert cells(markdown, "`qlung`")["Δ Score (4-class)"].endswith(" to `ce`")
    assert cells(markdown, "`control`")["Δ Score (4-class)"].endswith(" to `qlung`")
    assert cells(markdown, "`control`")["changed, or source"] == "quality_control measured → constant"
    frame = pd.read_csv(two_rows / "table.csv").set_index(["row", "score"])
    assert frame.loc[("control", "score_4class"), "reference"] == "qlung"
    expected = paired_difference_ci(**both_rows("control", "qlung", two_rows), resamples=200)["score_4class"]
    assert frame.loc[("control", "score_4class"), "difference"] == pytest.approx(expected.value)
    assert "headline score: 2, without" in markdown
    with pytest.raises(ValueError, match="qlung is compared with 'other', which is none of ce, qlung"):
        tabulate(two_rows, ["ce", "qlung"], qlung="other")


def both_rows(ours, theirs, folder, our_seeds=SEEDS, their_seeds=SEEDS):
    """What `paired_difference_ci` is to be given, read from the runs' files one by one, by item."""

    def read(name, seed):
        table = read_predictions(folder / name / f"seed_{seed}" / "predictions.parquet").dropna(subset="label")
        return table.sort_values("row_id")

    truth = read(ours, our_seeds[0])
    return {
        "labels": truth["label"].to_numpy(int),
        "predictions": [read(ours, seed)["prediction"].to_numpy(int) for seed in our_seeds],
        "baseline": [read(theirs, seed)["prediction"].to_numpy(int) for seed in their_seeds],
        "patients": truth["patient_id"].to_numpy(str),
    }


@pytest.mark.parametrize(
    ("seeds", "shared", "remark"),
    [
        ((1, 2, 3), (1, 2, 3), None),
        ((3, 2, 4), (3, 2), "`other` is compared with `ce` on the seeds of both, 3, 2."),
        ((4, 5, 6), (), "`other` and `ce` share no seed: theirs are drawn apart."),
    ],
)
def test_seeds_are_paired_by_number(two_rows, seeds, shared, remark):
    make_row(two_rows / "other", 0.6, seeds=seeds)
    asked = tuple(dict.fromkeys((*seeds, *SEEDS)))
    markdown = tabulate(two_rows, ["ce", "other"], asked)
    ours, theirs = (shared, shared) if shared else (seeds, SEEDS)
    arguments = both_rows("other", "ce", two_rows, ours, theirs)
    expected = paired_difference_ci(**arguments, resamples=200, paired_seeds=bool(shared))["score_4class"]
    found = pd.read_csv(two_rows / "table.csv").set_index(["row", "score"]).loc[("other", "score_4class")]
    names = ["difference", "difference_low", "difference_high"]
    assert found[names].tolist() == pytest.approx([expected.value, *expected.interval])
    assert (remark in markdown) if remark else ("share" not in markdown and "of both" not in markdown)


def test_tasks_share_no_table_and_are_not_compared(two_rows):
    rows = predicted(1, 0.9, classes=2)
    make_run(two_rows / "binary" / "seed_1", rows, {"task": "two-output"})
    make_run(two_rows / "events" / "seed_1", rows, {"task": "1-1", "dataset": "sprsound"})
    markdown = tabulate(two_rows, ["ce", "qlung", "binary", "events"])
    headings = [line for line in markdown.splitlines() if line.startswith("###")]
    assert headings[:3] == [
        "### icbhi test, 4-class, official split",
        "### icbhi test, two-output, official split",
        "### sprsound test, 1-1, official split",
    ]
    assert "Score (4-class)" not in cells(markdown, "`binary`")
    assert "Score (two-output)" not in cells(markdown, "`ce`")
    assert {"AS", "HS", "SE", "SP"} <= cells(markdown, "`events`").keys()
    assert "`binary` is not compared: `ce` is of the task 4-class, official split." in markdown
    assert "`events` is not compared: `ce` was not tested on sprsound test." in markdown
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
    markdown = tabulate(two_rows, ["ce", "odd"])
    assert "`odd` is not compared: `ce` was tested on other items or labels." in markdown
    assert "headline score: 0, without" in markdown


def test_unfinished_rows_are_shown_with_what_is_there(two_rows):
    make_row(two_rows / "half", 0.6, seeds=(1, 3))
    make_run(two_rows / "half" / "seed_2", predicted(2, 0.6), seed=2, ended=False)
    make_run(two_rows / "half" / "seed_9", predicted(9, 0.6), {"rho": 0.7}, seed=9)  # not asked for, and of before
    markdown = tabulate(two_rows, ["ce", "qlung", "half", "later"])
    assert cells(markdown, "`half`")["seeds"] == "2"
    assert "`half` is unfinished: of the seeds 1, 2, 3, ended: 1, 3." in markdown
    assert "`later` is unfinished: of the seeds 1, 2, 3, ended: none." in markdown
    markdown = tabulate(two_rows, ["later", "half"], seeds=(1, 3))
    assert "`half` is unfinished" not in markdown
    assert "`half` is not compared: `later` has no seed that has ended." in markdown
    with pytest.raises(ValueError, match="no run of later has ended"):
        tabulate(two_rows, ["later"])


PARTS = [range(0, 5), range(5, PATIENTS)]


def make_folds(folder, skill, seeds=SEEDS, unfinished=(), elsewhere=()):
    """Runs of two folds, each of which predicts its own patients and some that were kept apart."""
    for seed in seeds:
        every = predicted(seed, skill, unlabelled=0)
        for fold, patients in enumerate(PARTS):
            rows = [row for row in every if int(row["patient_id"][1:]) in patients]
            rows += predicted(seed, 0.9, "validation", patients=range(20, 24))
            ended = (seed, fold) not in unfinished
            make_run(
                folder / f"fold_{fold}" / f"seed_{seed}", [*rows, *elsewhere], {"fold": fold}, seed=seed, ended=ended
            )


def test_folds_of_a_seed_are_scored_together(tmp_path):
    elsewhere = predicted(1, 0.6, "sprsound:test_inter", patients=range(30, 34))
    make_folds(tmp_path / "folds", 0.7, unfinished=[(3, 1)], elsewhere=elsewhere)
    for seed in SEEDS:
        make_run(tmp_path / "whole" / f"seed_{seed}", predicted(seed, 0.7, unlabelled=0), seed=seed)
    whole = read_row(tmp_path / "whole", complete_options, SEEDS)
    folds = read_row(tmp_path / "folds", complete_options, SEEDS, (0, 1))
    assert (folds.seeds, folds.protocol, list(folds.splits)) == ([1, 2], "folds 0, 1", ["test"])
    pd.testing.assert_frame_equal(folds.splits["test"].items, whole.splits["test"].items)
    np.testing.assert_array_equal(folds.splits["test"].predictions, whole.splits["test"].predictions[:2])
    markdown = tabulate(tmp_path, ["folds"], folds=(0, 1))
    assert "### icbhi test, 4-class, folds 0, 1" in markdown
    assert "not the mean over folds" in markdown
    assert "`folds` is unfinished: of the seeds 1, 2, 3 (each with the folds 0, 1), ended: 1, 2." in markdown
    assert (tmp_path / "scores_icbhi_test_4-class_folds-0-1.png").is_file()


def test_folds_and_the_official_split_share_no_table(tmp_path):
    make_run(tmp_path / "ce" / "seed_1", predicted(1, 0.5))
    rows = [row for row in predicted(1, 0.8) if int(row["patient_id"][1:]) in PARTS[0]]
    make_run(tmp_path / "ce,fold=0" / "seed_1", rows, {"fold": 0})
    markdown = tabulate(tmp_path, ["ce", "ce,fold=0"], seeds=(1,))
    headings = [line for line in markdown.splitlines() if line.startswith("###")]
    assert headings[:2] == ["### icbhi test, 4-class, official split", "### icbhi test, 4-class, fold 0"]
    assert "`ce,fold=0` is not compared: `ce` is of the task 4-class, official split." in markdown
    assert pd.read_csv(tmp_path / "table.csv").set_index("row").loc["ce,fold=0", "protocol"].unique() == ["fold 0"]


def test_figures_are_drawn_and_named_in_the_table(two_rows):
    (two_rows / "qlung" / "seed_1" / "quality.png").touch()
    (two_rows / "qlung" / "seed_1" / "embedding_map.png").touch()
    (two_rows / "qlung" / "seed_2" / "attention.png").touch()  # the first seed's alone are linked
    for share in (0.0, 1.0):
        make_row(two_rows / f"qlung,quality_share={share}", 0.6, options={"head": "linear", "quality_share": share})
    names = ["ce", "qlung", "qlung,quality_share=0.0", "qlung,quality_share=1.0"]
    markdown = tabulate(two_rows, names)
    figures = {path.name for path in two_rows.glob("*.png")}
    assert figures == {
        "scores_icbhi_test_4-class.png",
        "confusion_icbhi_test_4-class.png",
        "sensitivity_quality_share_icbhi_test_4-class_qlung.png",
    }
    assert all(f"]({name})" in markdown for name in figures)
    links = "[quality](qlung/seed_1/quality.png), [embeddings](qlung/seed_1/embedding_map.png)"
    assert f"### Figures of each row\n\n- `qlung`, seed 1: {links}\n\n" in markdown


def test_the_part_that_chose_the_epoch_is_named(tmp_path):
    rows = predicted(1, 0.7, "test_intra") + predicted(1, 0.7, "test_inter")
    make_run(tmp_path / "intra" / "seed_1", rows, {"dataset": "sprsound", "select_on": "test_intra"})
    inter = tabulate(tmp_path, ["intra"], seeds=(1,)).split("### sprsound test_inter")[1]
    assert cells(inter, "`intra`")["epoch"] == "best epoch on test_intra"
    rows = predicted(1, 0.7) + predicted(1, 0.7, "sprsound:test_inter")
    make_run(tmp_path / "elsewhere" / "seed_1", rows, {"select_on": "test"})
    elsewhere = tabulate(tmp_path, ["elsewhere"], seeds=(1,)).split("### sprsound:test_inter (trained on icbhi)")[1]
    assert cells(elsewhere, "`elsewhere`")["epoch"] == "best epoch on icbhi test"


def test_sensitivity_knows_defaults_and_wants_all_else_equal(two_rows):
    # The loss's own 0.5, which no recipe names, is one of the values; a row with another loss is none.
    for share in (0.0, 1.0):
        make_row(two_rows / f"share-{share}", 0.6, seeds=(1,), options={"head": "linear", "quality_share": share})
    make_row(two_rows / "other", 0.6, seeds=(1,), options={"head": "linear", "quality_share": 0.2, "scale": 30.0})
    names = ["ce", "share-1.0", "qlung", "share-0.0", "other"]
    rows = [read_row(two_rows / name, complete_options, SEEDS) for name in names]
    ((option, varied),) = sensitivities(compare(rows, dict.fromkeys(names, "ce")))
    assert option == "quality_share"
    assert [result.row.name for result in varied] == ["share-0.0", "qlung", "share-1.0"]
    assert [result.row.options[option] for result in varied] == [0.0, 0.5, 1.0]
    assert {result.group for result in varied} == {Group("icbhi", "test", "4-class", OFFICIAL)}


def test_published_scores_of_several_splits_name_theirs(tmp_path):
    rows = predicted(1, 0.7, "test_intra") + predicted(1, 0.7, "test_inter")
    nested = {"published": {"test_inter": {"score_4class": 50}}, "source": "a paper"}
    make_run(tmp_path / "nested" / "seed_1", rows, about=nested)
    make_run(tmp_path / "flat" / "seed_1", rows, about={"published": {"score_4class": 50}})
    markdown = tabulate(tmp_path, ["nested", "flat"])
    assert markdown.count("nested, published") == 1
    assert markdown.index("icbhi test_inter") < markdown.index("nested, published")
    assert "`flat`: its published scores do not say that they are of test_intra or test_inter." in markdown


def test_published_scores_stand_in_the_tables_of_their_splits(tmp_path):
    rows = predicted(1, 0.7) + predicted(1, 0.7, "sprsound:test_inter")
    nested = {"published": {"test": {"score_4class": 62}, "sprsound:test_inter": {"score_4class": "58.23 ± 3.83"}}}
    make_run(tmp_path / "nested" / "seed_1", rows, about=nested)
    make_run(tmp_path / "flat" / "seed_1", rows, about={"published": {"score_4class": 50}})
    make_run(tmp_path / "home" / "seed_1", predicted(1, 0.7), about=nested)
    here, elsewhere = tabulate(tmp_path, ["nested", "flat", "home"], seeds=(1,)).split("### sprsound:test_inter")
    assert cells(here, "*nested, published*")["Score (4-class)"] == "62.00"
    assert cells(here, "*home, published*")["Score (4-class)"] == "62.00"
    assert cells(here, "*flat, published*")["Score (4-class)"] == "50.00"  # of the dataset that was trained on
    assert cells(elsewhere, "*nested, published*")["Score (4-class)"] == "58.23 ± 3.83"
    assert "flat, published" not in elsewhere
    assert (tmp_path / "scores_icbhi_sprsound-test_inter_4-class.png").is_file()


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
        tabulate(tmp_path, ["row"])


def test_overlapping_folds_are_refused(tmp_path):
    for fold in range(2):
        make_run(tmp_path / "row" / f"fold_{fold}" / "seed_1", predicted(1, 0.5))
    with pytest.raises(ValueError, match="predicted twice with one seed; do its folds overlap"):
        read_row(tmp_path / "row", complete_options, (1,), (0, 1))
