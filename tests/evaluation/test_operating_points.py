"""Operating points: rates on constructed scores, and the command on a run of its own."""

import json
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import roc_auc_score
from transformers import ASTConfig

import hf_datasets
from modeling_qlung import QLungConfig, QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.evaluation import operating_points
from modeling_qlung.evaluation.model_card import describe_operating_points
from modeling_qlung.evaluation.operating_points import Scored, _half, score_recordings
from modeling_qlung.evaluation.report import write_predictions
from modeling_qlung.evaluation.tasks import FOUR_CLASS
from modeling_qlung.inference import Analysis, LungSoundAnalyzer, OperatingPoints
from tests.encoders import TINY_AST


def test_rates_count_what_reaches_the_threshold():
    scored = Scored(np.array([0.1, 0.5, 0.5, 0.9]), np.array([False, False, True, True]), np.array(list("aabb")))
    assert scored.counts == {"abnormal": 2, "normal": 2}
    assert scored.rates(np.array([0.0, 0.5, 0.6, 1.0])) == {
        "sensitivity": [1.0, 1.0, 0.5, 0.0],
        "specificity": [0.0, 0.5, 1.0, 1.0],
    }


def test_the_best_threshold_lies_in_the_middle_of_its_gap():
    scored = Scored(np.array([0.1, 0.3, 0.7, 0.9]), np.array([False, False, True, True]), np.array(list("abcd")))
    assert scored.best_threshold() == pytest.approx(0.5, abs=0.011)


def test_what_is_told_has_the_auroc_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.random(200) < 0.3
    abnormal = np.clip(rng.normal(0.4 + 0.2 * truth, 0.2), 0, 1)
    told = Scored(abnormal, truth, rng.integers(0, 40, 200).astype(str)).describe(0.5)
    assert told.startswith(f"AUROC {100 * roc_auc_score(truth, abnormal):.1f} [")
    assert f"sensitivity {100 * (abnormal[truth] >= 0.5).mean():.1f} [" in told
    assert f"specificity {100 * (abnormal[~truth] < 0.5).mean():.1f} [" in told


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0.0, 0.5, 0.1), (0.0, 1.0, 0.8), (0.2, 1.0, 0.8), (0.0, 1.9, 0.3), (0.5, 2.0, 0.3), (0.6, 0.7, 0.8)],
)
def test_a_cycle_is_called_abnormal_where_half_of_it_is_marked(start, end, expected):
    abnormal = np.array([0.1, 0.8, 0.3, 0.2])
    edges = np.array([[0.0, 0.5], [0.5, 1.0], [1.0, 1.5], [1.5, 2.0]])
    probabilities = np.stack([1 - abnormal, abnormal], axis=1)
    analysis = Analysis(2.0, ["normal", "crackle"], 0, edges, probabilities, 0.5, False, None, [], [], True)
    threshold = _half(analysis, start, end)
    assert threshold == pytest.approx(expected)
    for at, called in ((threshold, True), (threshold + 1e-6, False)):
        spans = analysis.at(at).spans
        marked = sum(max(0.0, min(end, span.end) - max(start, span.start)) for span in spans)
        assert (marked >= (end - start) / 2 - 1e-9) == called


@pytest.fixture(scope="module")
def some_recordings(real_sprsound, tmp_path_factory):
    """A folder with the first three recordings of SPRSound of each of some kinds."""
    folder, taken = tmp_path_factory.mktemp("sprsound") / "BioCAS2022", Counter()
    for name in ("train2022_json", "train2022_wav"):
        (folder / name).mkdir(parents=True)
    for path in sorted((real_sprsound / "BioCAS2022" / "train2022_json").glob("*.json")):
        kind = json.loads(path.read_text())["record_annotation"]
        taken[kind] += 1
        if taken[kind] <= 3 and kind != "CAS & DAS":
            (folder / "train2022_json" / path.name).symlink_to(path)
            wav = real_sprsound / "BioCAS2022" / "train2022_wav" / f"{path.stem}.wav"
            (folder / "train2022_wav" / wav.name).symlink_to(wav)
    return folder.parent


@pytest.fixture(scope="module")
def run(some_recordings, tmp_path_factory):
    """A folder as a run leaves it that kept all patients but one apart, and their recordings."""
    folder = tmp_path_factory.mktemp("run")
    names = dict(enumerate(FOUR_CLASS.classes))
    encoder = ASTConfig(**{**TINY_AST, "max_length": 98})
    QLungForAudioClassification(
        QLungConfig(encoder.to_dict(), id2label=names, label2id={name: index for index, name in names.items()})
    ).save_pretrained(folder)
    QLungFeatureExtractor(duration=1.0).save_pretrained(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"dataset": "sprsound"}))
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
        "--window=1",
        "--hop=0.5",
        "--on",
        "sprsound:train",
    ]
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
    assert "sprsound:train, recordings" in told
    assert "sprsound:train that were kept apart" in points.about
    card = describe_operating_points(points)
    assert f"| recordings | {points.recordings['abnormal']} | {points.recordings['normal']} | " in card


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
    with pytest.raises(SystemExit, match="holds no run that has ended"):
        operating_points.main([str(tmp_path)])
    folder, _, _ = run
    rows = [row for row in pq.read_table(folder / "predictions.parquet").to_pylist() if row["split"] == "test"]
    write_predictions(tmp_path / "predictions.parquet", rows)
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    with pytest.raises(SystemExit, match="kept no validation patients apart: train with --validation_fraction"):
        operating_points.main([str(tmp_path)])
