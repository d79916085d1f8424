"""Operating points: rates on constructed scores, and the command on a run of its own."""

import re
from collections import defaultdict

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score
from transformers import ASTConfig

import hf_datasets
from modeling_qlung import QLungConfig, QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.evaluation import operating_points
from modeling_qlung.evaluation.model_card import describe_operating_points
from modeling_qlung.evaluation.operating_points import Scored, score_recordings
from modeling_qlung.evaluation.report import write_predictions
from modeling_qlung.evaluation.tasks import FOUR_CLASS
from modeling_qlung.inference import LungSoundAnalyzer, OperatingPoints
from tests import sprsound
from tests.encoders import TINY_AST


def scored_as(abnormal, truth, patients, quality=None) -> Scored:
    quality = np.full(len(truth), np.nan) if quality is None else quality
    return Scored(np.asarray(abnormal), np.asarray(truth, bool), np.asarray(patients), np.asarray(quality))


def test_rates_count_what_reaches_the_threshold():
    scored = scored_as([0.1, 0.5, 0.5, 0.9], [False, False, True, True], list("aabb"))
    assert scored.counts == {"abnormal": 2, "normal": 2}
    assert scored.rates(np.array([0.0, 0.5, 0.6, 1.0])) == {
        "sensitivity": [1.0, 1.0, 0.5, 0.0],
        "specificity": [0.0, 0.5, 1.0, 1.0],
    }


def test_the_best_threshold_lies_in_the_middle_of_its_gap():
    scored = scored_as([0.1, 0.3, 0.7, 0.9], [False, False, True, True], list("abcd"))
    assert scored.best_threshold() == pytest.approx(0.5, abs=0.011)


def test_scores_are_those_of_scikit_learn_within_their_intervals():
    rng = np.random.default_rng(0)
    truth = rng.random(200) < 0.3
    abnormal = np.clip(rng.normal(0.4 + 0.2 * truth, 0.2), 0, 1)
    scores = scored_as(abnormal, truth, rng.integers(0, 40, 200).astype(str)).scores(0.5)
    expected = [roc_auc_score(truth, abnormal), (abnormal[truth] >= 0.5).mean(), (abnormal[~truth] < 0.5).mean()]
    for (value, low, high), of in zip(scores.values(), expected, strict=True):
        assert value == pytest.approx(of)
        assert low < value < high < low + 0.3


def test_what_cannot_be_said_is_left_empty():
    scored = scored_as([0.1, 0.9], [True, True], ["a", "a"])
    assert scored.scores(0.5) == {
        "AUROC": [None, None, None],
        "sensitivity": [0.5, None, None],
        "specificity": [None, None, None],
    }


def test_a_gate_is_worth_what_it_refuses_wrong_answers():
    abnormal, truth = [0.9, 0.2, 0.6, 0.1], [True, False, False, True]  # the last two are called wrong
    assert scored_as(abnormal, truth, list("abcd"), [0.9, 0.8, 0.3, 0.2]).gate(0.5, 0.5) == {
        "coverage": 0.5,
        "risk": 0.5,
        "selective_risk": 0.0,
        "selective_risk_confidence": 0.5,
        "aurc_quality": pytest.approx((1 / 3 + 1 / 2) / 4),
        "aurc_confidence": pytest.approx((1 / 2 + 1 / 2 + 1 / 3 + 1 / 2) / 4),  # 0.9 and 0.1 are equally far
    }
    assert scored_as(abnormal, truth, list("abcd"), np.zeros(4)).gate(0.5, 0.5)["selective_risk"] is None
    assert scored_as(abnormal, truth, list("abcd")).gate(0.5, 0.5) == {}
    assert scored_as([], [], []).gate(0.5, 0.5) == {}


@pytest.fixture(scope="module")
def some_recordings(real_sprsound, tmp_path_factory):
    """A folder with the first three recordings of SPRSound of each of some kinds."""
    of_kind = defaultdict(list)
    for name, kind in sprsound.annotations(real_sprsound).items():
        of_kind[kind].append(name)
    del of_kind["CAS & DAS"]
    folder = tmp_path_factory.mktemp("sprsound")
    sprsound.link(real_sprsound, folder, [name for names in of_kind.values() for name in names[:3]])
    return folder


@pytest.fixture(scope="module")
def run(some_recordings, tmp_path_factory):
    """A folder as a run leaves it that kept all patients but one apart, and their recordings."""
    folder = tmp_path_factory.mktemp("run")
    names = dict(enumerate(FOUR_CLASS.classes))
    encoder = ASTConfig(**{**TINY_AST, "max_length": 98})
    torch.manual_seed(0)
    QLungForAudioClassification(
        QLungConfig(encoder.to_dict(), id2label=names, label2id={name: index for index, name in names.items()})
    ).save_pretrained(folder)
    QLungFeatureExtractor(duration=1.0, quality_score="learned").save_pretrained(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"dataset": "sprsound", "windows": 1.0, "level": 0.02}))
    cache = tmp_path_factory.mktemp("cache")
    recordings = hf_datasets.load(
        "sprsound", some_recordings, "recordings", "train", allow_missing_audio=True, cache_dir=cache
    )
    *patients, _ = sorted(set(recordings["patient_id"][:]))
    rng = np.random.default_rng(0)
    rows = [(split, patient, index) for split in ("validation", "test") for patient in patients for index in range(4)]
    write_predictions(
        folder / "predictions.parquet",
        [
            {
                "row_id": f"{patient}:{index}",
                "patient_id": patient,
                "split": split,
                "label": index,
                "prediction": 0,
                "logits": rng.normal(size=4).tolist(),
                "quality": None,
            }
            for split, patient, index in rows
        ],
    )
    chosen = [index for index, patient in enumerate(recordings["patient_id"][:]) if patient in patients]
    return folder, recordings.select(chosen), patients


def test_the_command_writes_what_the_analyzer_reads(run, some_recordings, capsys):
    folder, recordings, patients = run
    words = [
        f"--data_dir={some_recordings}",
        "--allow_missing_audio",
        "--on",
        "sprsound:train",
        "--spoiled",
    ]
    (folder / "operating_points.json").write_text('{"about": "of an earlier version"}')
    operating_points.main([str(folder), *words])
    told = capsys.readouterr().out
    points = OperatingPoints.from_file(folder / "operating_points.json")
    analyzer = LungSoundAnalyzer.from_pretrained(folder)
    assert (analyzer.window, analyzer.hop, analyzer.threshold) == (1.0, 0.5, points.threshold)
    scored, cycles = score_recordings(analyzer, recordings)
    assert points.patients == len(set(scored.patients))
    assert points.cycles == cycles.counts
    annotated = [cycle for row in recordings.remove_columns("audio") for cycle in row["cycles"]]
    assert sum(points.cycles.values()) == sum(cycle["label"] is not None for cycle in annotated)
    assert set(scored.patients) < set(patients), "nobody has annotated the poor ones"
    assert points.recordings == scored.counts
    assert min(points.recordings.values()) >= 2
    called = scored.abnormal >= points.threshold
    at = points.at(points.threshold)["recordings"]
    assert at["sensitivity"] == pytest.approx(called[scored.truth].mean(), abs=1e-4)
    assert at["specificity"] == pytest.approx((~called[~scored.truth]).mean(), abs=1e-4)
    assert analyzer.level == points.level == 0.02
    assert "Trained on parts of SPRSound 2022 (children (1 month to 18 years) of one hospital" in points.about
    card = describe_operating_points(points)
    assert card in told
    of_patients = f"{points.recordings['abnormal']} | {points.recordings['normal']} | "
    assert f"| patients kept apart | recordings | {of_patients}" in card
    assert "\n| sprsound:train | cycles | " in card
    sensitivity = rf"{100 * at['sensitivity']:.1f}( \([^|]*\))?"  # no interval where there are too few patients
    assert re.search(rf"patients kept apart \| recordings \| \d+ \| \d+ \| [^|]+ \| {sensitivity} \| ", card)
    expected = scored.gate(points.threshold, analyzer.quality_threshold)
    gates = points.scores[0]["gates"]
    assert gates["patients kept apart"] == pytest.approx(expected, abs=1e-3)
    assert gates["patients kept apart, with spoiled copies"]["coverage"] < expected["coverage"]
    assert f"\n| patients kept apart | {100 * expected['coverage']:.1f} | {100 * expected['risk']:.1f} | " in card
    for part in ("patients_kept_apart", "sprsound_train", "sprsound_train_with_spoiled_copies"):
        assert f"](risk_coverage_recordings_{part}.png)" in card
        assert (folder / f"risk_coverage_recordings_{part}.png").stat().st_size > 10_000


def test_an_annotated_cycle_is_scored_as_where_a_person_gives_it(run):
    folder, recordings, _ = run
    analyzer = LungSoundAnalyzer.from_pretrained(folder)
    row = next(row for row in recordings.data.to_pylist() if len(row["cycles"]) > 1)
    _, cycles = score_recordings(analyzer, datasets.Dataset(pa.Table.from_pylist([row], recordings.data.schema)))
    given = [(cycle["start"], cycle["end"]) for cycle in row["cycles"]]
    found = analyzer(row["audio"]["bytes"], cycles=given)
    np.testing.assert_array_equal(cycles.abnormal, found.abnormal)
    assert cycles.truth.tolist() == [cycle["crackle"] or cycle["wheeze"] for cycle in row["cycles"]]


def test_recordings_without_annotation_and_those_without_a_label_are_left_out(run):
    folder, recordings, _ = run
    analyzer = LungSoundAnalyzer.from_pretrained(folder)
    table = recordings.data.to_pylist()
    annotated = [row for row in table if row["cycles"]][:2]
    poor = next(row for row in table if not row["cycles"])
    for cycle in annotated[0]["cycles"]:
        cycle.update(label=None, crackle=False, wheeze=False)
    rows = pa.Table.from_pylist([*annotated, poor], schema=recordings.data.schema)
    scored, _ = score_recordings(analyzer, datasets.Dataset(rows))
    assert scored.patients.tolist() == [annotated[1]["patient_id"]]


def test_a_folder_without_a_run_and_one_without_validation_patients_are_named(tmp_path, run):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(SystemExit, match="holds no run that has ended"):
            operating_points.main([str(folder)])
    (tmp_path / "predictions.parquet").write_text("no table")
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    with pytest.raises(SystemExit, match="holds no run that has ended"):
        operating_points.main([str(tmp_path)])
    folder, _, _ = run
    rows = [row for row in pq.read_table(folder / "predictions.parquet").to_pylist() if row["split"] == "test"]
    write_predictions(tmp_path / "predictions.parquet", rows)
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    with pytest.raises(SystemExit, match="kept no validation patients apart: train with --validation_fraction"):
        operating_points.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--window", "2"], "--hop 0.5 --window 2: .* a window at most the 1 s that the model takes"),
        (["--quality_threshold", "7"], "--quality_threshold 7: give one from 0 to 1"),
        (["--hop", "0.6", "--window", "0.5"], "--hop 0.6 --window 0.5: a hop is above 0 and at most a window"),
        (["--hop", "0"], "--hop 0 --window 1"),
        (["--on", "sprsound"], "sprsound: give DATASET:SPLIT, such as sprsound:test_intra"),
        (["--on", "sprsound:test"], "unknown split of sprsound 'test': choose from all, train"),
        (["--on", "icbhi:test"], "ICBHI_final_database"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(words, told, run, some_recordings):
    folder, _, _ = run
    with pytest.raises(SystemExit, match=told):
        operating_points.main([str(folder), f"--data_dir={some_recordings}", "--allow_missing_audio", *words])
