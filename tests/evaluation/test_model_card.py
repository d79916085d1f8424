import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from modeling_qlung.evaluation.model_card import RunDescription, build_model_card
from modeling_qlung.evaluation.tasks import FOUR_CLASS

SCORES = {
    "specificity": 81.904,
    "sensitivity_4class": 42.12,
    "score_4class": 62.012,
    "sensitivity_2class": None,
    "score_2class": 70.0,
    "recall": {"normal": 81.9, "crackle": 45.0, "wheeze": None, "both": 20.0},
    "support": {"normal": 1579, "crackle": 649, "wheeze": 0, "both": 143},
    "ci95": {score: [58.5, 65.25] for score in FOUR_CLASS.titles} | {"sensitivity_2class": None},
    "patients": 49,
    "unlabelled": 2,
}


@pytest.fixture
def run():
    return RunDescription(
        model_name="qlung-ast-icbhi",
        recipe="qlung-ast",
        description="The angular classifier with quality-adaptive margins.",
        source="QLung (Interspeech 2026), ablation, last row",
        options={"learning_rate": 5.0e-05, "output_dir": Path("runs/a"), "classes": (0, 1)},
        datasets=["icbhi"],
        counts={"train": {"normal": 2063, "crackle": 1215, "wheeze": 501, "both": 363}, "test": SCORES["support"]},
        metrics={"test": SCORES},
        selection="validation",
        command="accelerate launch train.py qlung-ast --seed 1",
        versions={"torch": "2.11.0", "transformers": "5.23.0"},
        seed=1,
        num_parameters=86_189_568,
        architecture={"backbone": "audio-spectrogram-transformer", "pooling": "cls_dist", "duration": 8.0},
        quality={"normalization": "percentile", "entropy_range": [0.1, 0.9]},
        published={"score_4class": "62.01 ± 1.18"},
        base_model="MIT/ast-finetuned-audioset-10-10-0.4593",
    )


def test_header_opens_on_the_hub_with_its_scores(run):
    data = ModelCard(build_model_card(run)).data
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "audio-classification"
    assert data.base_model == "MIT/ast-finetuned-audioset-10-10-0.4593"
    assert data.model_name == "qlung-ast-icbhi"
    results = {result.metric_type: result for result in data.eval_results}
    # What is undefined is no result.
    assert set(results) == {"specificity", "sensitivity_4class", "score_4class", "score_2class"}
    assert results["score_4class"].metric_value == 62.01
    assert results["score_4class"].dataset_split == "test"


def test_card_without_any_score_still_has_a_header(run):
    undefined = SCORES | dict.fromkeys(FOUR_CLASS.titles)
    card = ModelCard(build_model_card(replace(run, metrics={"test": undefined})))
    assert card.data.eval_results is None
    assert "| Score (4-class) | – |" in card.content


def test_scores_stand_with_intervals_and_support(run):
    card = build_model_card(run)
    assert "### test: 2,371 cycles of 49 patients" in card
    assert "| Score (4-class) | 62.01 | [58.50, 65.25] |" in card
    assert "| Se (2-class) | – | – |" in card
    assert "| wheeze | 0 | – |" in card
    assert "2 further cycles without one of these labels: not scored." in card
    assert "Published in QLung (Interspeech 2026), ablation, last row: Score (4-class) 62.01 ± 1.18." in card


def test_another_datasets_split_is_told_as_its_own(run):
    metrics = {"test": SCORES, "sprsound:test_inter": SCORES}
    published = {"test": {"score_4class": "62.01 ± 1.18"}, "sprsound:test_inter": {"score_4class": 58.23}}
    card = build_model_card(replace(run, metrics=metrics, published=published))
    places = [(r.dataset_type, r.dataset_name, r.dataset_split) for r in ModelCard(card).data.eval_results]
    assert set(places) == {("icbhi", "ICBHI 2017", "test"), ("sprsound", "SPRSound 2022", "test_inter")}
    assert "ablation, last row for test: Score (4-class) 62.01 ± 1.18." in card
    assert "ablation, last row for sprsound:test_inter: Score (4-class) 58.23." in card


def test_selection_is_said_plainly_and_in_bold_for_test(run):
    cards = {s: build_model_card(replace(run, selection=s)) for s in ("validation", "last", "test")}
    assert "chosen by its score on validation patients" in cards["validation"]
    assert "No epoch was chosen" in cards["last"]
    assert "**The epoch was chosen on the TEST part" in cards["test"]
    assert all("TEST" not in cards[s] for s in ("validation", "last"))


def test_recipe_can_be_run_again(run):
    card = build_model_card(run)
    options, architecture = (
        yaml.safe_load(re.search(rf"{title}:\n\n```yaml\n(.*?)```", card, re.DOTALL)[1])
        for title in ("Options that differ from the defaults", "Model")
    )
    assert options == {"learning_rate": 5.0e-05, "output_dir": "runs/a", "classes": [0, 1]}
    assert architecture["duration"] == 8.0
    assert "```bash\naccelerate launch train.py qlung-ast --seed 1\n```" in card
    assert "Seed 1, 86,189,568 parameters, fine-tuned from `MIT/ast-finetuned-audioset-10-10-0.4593`" in card
    assert "torch 2.11.0, transformers 5.23.0" in card
    assert "It follows QLung (Interspeech 2026), ablation, last row." in card
    assert "Nothing published corresponds to it." in build_model_card(replace(run, source=None, published={}))


def test_examples_are_python(run):
    blocks = re.findall(r"```python\n(.*?)```", build_model_card(replace(run, repo_id="me/qlung")), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
    assert 'repo = "me/qlung"' in blocks[0]
    assert 'soundfile.read("cycle_16khz.wav"' in blocks[0]


def test_a_clap_card_asks_for_48_khz(run):
    card = build_model_card(replace(run, sampling_rate=48000, architecture={"encoder": "clap_audio_model"}))
    assert "mono, at 48 kHz" in card
    assert 'soundfile.read("cycle_48khz.wav"' in card
    assert "16" not in re.search(r"## How to use\n(.*?)\n## ", card, re.DOTALL)[1]


def test_data_says_what_was_missing_and_what_its_terms_are(run):
    card = build_model_card(replace(run, missing="audio of 864 of the 920 recordings"))
    assert "**Missing: audio of 864 of the 920 recordings**" in card
    assert "Trained on parts of ICBHI 2017" in card
    assert "Not all of them were there" in " ".join(card.split())
    assert "| train | 2,063 | 1,215 | 501 | 363 | 4,142 |" in card
    assert "the ICBHI 2017 database is free for research" in card
    assert "Nothing of the data was missing." in build_model_card(run)
    assert "Creative Commons Attribution" in build_model_card(replace(run, datasets=["sprsound"]))
    simulated = build_model_card(replace(run, datasets=["simulated"]))
    assert "no patient at all" in simulated
    assert ("human judgements" in build_model_card(run), "human judgements" in simulated) == (True, False)


def test_a_model_of_two_datasets_names_both_and_whose_the_scores_are(run):
    metrics = {"validation": SCORES, "test_intra": SCORES, "icbhi:test": SCORES}
    card = build_model_card(replace(run, datasets=["sprsound", "icbhi"], metrics=metrics))
    for told in (
        "one hospital in Shanghai",
        "126 patients of all ages",
        "free for research",
        "B. M. Rocha",
        "Q. Zhang",
    ):
        assert told in card
    names = {result.dataset_split: result.dataset_name for result in ModelCard(card).data.eval_results}
    assert names == {
        "validation": "SPRSound 2022 and ICBHI 2017",
        "test_intra": "SPRSound 2022",
        "test": "ICBHI 2017",
    }


def test_a_model_of_windows_says_how_long_they_are(run):
    card = build_model_card(replace(run, options={"windows": 2.0}))
    assert "A classifier of 2 s windows: normal, crackle" in card
    assert 'soundfile.read("window_16khz.wav"' in card
    assert "### test: 2,371 windows of 49 patients" in card
    assert "It expects any 2 s of a recording" in card
    assert "at 16 kHz.\n" in card
    levelled = build_model_card(replace(run, options={"windows": 2.0, "level": 0.05}))
    assert "at 16 kHz, of a recording brought to an RMS amplitude of 0.05.\n" in levelled
    assert "cycle" not in card.split("## Recording quality")[0].split("## Scores")[1].replace(run.task.definition, "")


def test_optional_parts_are_left_out(run):
    full = replace(run, shared_patients={"test": 2}, figures={"Confusion": "confusion.png"})
    bare = replace(run, quality=None, published={}, base_model=None)
    assert "**2 of these 49 patients are in the training part too**" in build_model_card(full)
    assert "![Confusion](confusion.png)" in build_model_card(full)
    assert "normalization: percentile" in build_model_card(full)
    card = build_model_card(bare)
    assert "Do not rely on them" not in card
    few = replace(run, metrics={"test": {**SCORES, "patients": 9}})
    assert "Fewer than 10 patients" in build_model_card(few)
    assert "in the training part too" not in card
    assert "Published in" not in card
    assert "This run did not use recording quality." in card
    assert "trained from scratch" in card
    assert "base_model" not in card


def test_limits_and_citations_are_there(run):
    card = build_model_card(run)
    assert "Not a medical device" in card
    assert "2606.11915" in card
    assert "2512.22564" in card
    assert "None" not in card


def test_unknown_dataset_or_selection_is_refused(run):
    with pytest.raises(ValueError, match="dataset is 'coswara': the card knows icbhi, sprsound, simulated"):
        replace(run, datasets=["coswara"])
    with pytest.raises(ValueError, match="selection is 'best': the card knows validation, last, test"):
        replace(run, selection="best")


def test_the_learned_quality_score_is_told_apart(run):
    card = build_model_card(replace(run, quality={"score": "learned"}))
    section = card.split("## Recording quality")[1].split("##")[0]
    assert "probability that a clinician would call" in section
    assert "entropy" not in section
