import dataclasses
import re

import pytest
import yaml

from modeling_qlung.training.arguments import ARGUMENTS, parse, read_recipe, recipe_names
from modeling_qlung.training.build import build_training_loss
from modeling_qlung.training.losses import LOSSES


def test_the_command_line_overrides_the_recipe():
    recipe, (data, model, method, training) = parse(["qlung-ast", "--learning_rate", "1e-3", "--seeds", "1", "2"])
    assert recipe.name == "qlung-ast"
    assert training.learning_rate == 1e-3
    assert method.seeds == [1, 2]
    assert data.dataset == "icbhi"
    assert model.encoder == "MIT/ast-finetuned-audioset-10-10-0.4593"
    assert training.output_dir == "runs/qlung-ast"
    assert recipe.options["learning_rate"] == 1e-3
    assert "warmup_steps" not in recipe.options, "only what differs from a default is listed"


def test_without_a_recipe_it_is_quickstart():
    assert parse([])[0].name == "quickstart"
    assert parse(["--seed", "3"])[1][3].seed == 3


def test_a_recipe_is_also_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("dataset: simulated\nlearning_rate: 5.0e-4\nabout: {source: a test}\n")
    recipe, (_, _, _, training) = parse([str(path)])
    assert (recipe.name, recipe.about, training.learning_rate) == ("mine", {"source": "a test"}, 5e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: 5e-5\n", r"learning_rate is the text '5e-5'. YAML needs a point in such numbers: 5.0e-5"),
        ("lerning_rate: 0.1\n", "unknown options lerning_rate"),
        ("normalization: trian\n", "argument --normalization.*invalid choice: 'trian'"),
        ("num_train_epochs: many\n", "num_train_epochs is the text 'many'"),
        ("bf16: maybe\n", "argument --bf16.*maybe"),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path, content, message, capsys):
    (tmp_path / "wrong.yaml").write_text(content)
    with pytest.raises(SystemExit) as error:
        parse([str(tmp_path / "wrong.yaml")])
    assert re.search(message, str(error.value) + capsys.readouterr().err)


def test_unknown_recipes_and_options_are_named(capsys):
    with pytest.raises(SystemExit, match=r"There is no recipe 'qlong'\. Choose one of .*quickstart"):
        parse(["qlong"])
    with pytest.raises(SystemExit):
        parse(["quickstart", "--margin_wieght", "1"])
    assert "unknown arguments --margin_wieght 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["quickstart", "--pooling", "max"])
    assert "invalid choice: 'max'" in capsys.readouterr().err


def test_help_groups_every_option_with_its_meaning_and_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for heading in ("data:", "model:", "method:", "training (Transformers' TrainingArguments):"):
        assert f"\n{heading}\n" in text
    for group in ARGUMENTS[:3]:
        for option in dataclasses.fields(group):
            assert f"--{option.name}" in text
            assert option.metadata["help"], f"{option.name} says nothing"
    assert "(default: 0.05)" in text


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_says_what_it_stands_for(name):
    _, arguments = parse([name])
    about = read_recipe(name).about
    assert about["description"].endswith(".")
    assert about.keys() <= {"description", "source", "published", "selection", "unknown"}
    assert ("selection" in about) == ("published" in about)
    assert "source" in about or "published" not in about
    assert "published" in about or "source" not in about or "unknown" in about
    published = about.get("published", {})
    tested = ["test", *(arguments[0].also_test or ())]
    parts = [published[split] for split in tested] if published.keys() == set(tested) else [published]
    for score, value in (item for part in parts for item in part.items()):
        assert score in ("specificity", "sensitivity_4class", "score_4class", "sensitivity_2class", "score_2class")
        assert 0 < float(str(value).split("±")[0]) < 100


def test_no_published_row_stands_for_two_recipes():
    claimed = [str(published) for name in recipe_names() if (published := read_recipe(name).about.get("published"))]
    assert len(set(claimed)) == len(claimed)


def test_the_issued_options_make_the_same_run_again(tmp_path):
    recipe, arguments = parse(["sam-ast", "--rho", "0.1"])
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump({"about": recipe.about, **recipe.options}))
    again, same = parse([str(path)])
    assert again.options == recipe.options
    for one, other in zip(arguments[:3], same[:3], strict=True):
        assert one == other


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_goes_with_every_loss(name, loss):
    """What a recipe sets for its own loss is left out; only a linear head and margins on cosines do not go together."""
    words = [name, "--loss", loss]
    if loss in ("arcface", "cosface", "adaface", "ldam"):
        words += ["--head", "angular"]
    recipe, (_, model, method, _) = parse(words)
    built = build_training_loss(method, model.scale, [1, 1, 1, 1])
    assert type(built) is LOSSES[loss]
    assert recipe.options.get("loss", "qlung") == loss


def test_a_setting_of_the_loss_reaches_it():
    _, (_, model, method, _) = parse(["qlung-ast", "--quality_share", "1", "--fixed_margin", "0.3"])
    loss = build_training_loss(method, model.scale, [1, 2, 3, 4])
    assert (loss.quality_share, loss.fixed_margin, loss.margin_scale, loss.plain.scale) == (1.0, 0.3, 15.0, 37.0)
    _, (_, model, method, _) = parse(["ast-ce", "--class_weight_power", "1", "--label_smoothing", "0.2"])
    loss = build_training_loss(method, model.scale, [3, 1, 1, 1])
    assert loss.class_weights.tolist() == pytest.approx([0.5, 1.5, 1.5, 1.5])
    assert loss.label_smoothing == 0.2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss", "arcface", "--margin_weight", "1"], "--margin_weight is no option of the loss arcface"),
        (["--loss", "arcfase"], "there is no loss 'arcfase': choose one of qlung, cross_entropy"),
        (["--loss", "arcface", "--head", "linear"], "a linear head would infer without: --head angular"),
        (["--loss", "ldam", "--class_weight_power", "1"], "the loss ldam takes no class weights"),
        (["--validation_fraction", "0"], "--select_on validation needs validation patients"),
        (["--save_strategy", "no"], "give --eval_strategy and --save_strategy the same value"),
        (["--eval_strategy", "steps", "--eval_steps", "5"], "give --eval_strategy and --save_strategy the same value"),
        (["--save_only_model", "true"], "leaves out what a killed run needs"),
        (["--seeds", "1", "2", "1"], "names a seed twice"),
        (["--also_train", "icbhi"], "--also_train icbhi: name dataset and split"),
        (["--also_train", "simulated:test"], "--also_train simulated:test is of the dataset that is trained on"),
        (["--also_train", "icbhi:test", "--also_test", "icbhi:test"], "--also_train icbhi:test is of the dataset"),
        (["--level", "0.1"], "--level 0.1: give a positive RMS amplitude, and --windows with it"),
        (["--level", "0", "--windows", "2"], "--level 0.0: give a positive RMS amplitude"),
        (["--windows", "0"], "--windows 0.0: give a positive length"),
        (["--windows", "2", "--task", "1-1"], "--windows 2.0: give a positive length in seconds, for the task 4-class"),
        (["--sampling_power", "0", "--windows", "2", "--train_parquet", "x"], "and --windows 2.0 cuts recordings"),
        (["--durations", "4", "2"], "durations are [4.0, 2.0]; give two or more in ascending order"),
        (["--durations", "2", "4", "--num_frames", "400"], "num_frames is 400, but durations give each clip its own"),
        (["--durations", "2", "4", "--duration", "8"], "--duration 8.0 goes with no --durations but such that"),
        (["--durations", "2", "4", "--front_end", "clap"], "CLAP stretches all input to one grid"),
    ],
)
def test_options_that_do_not_go_together_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(["quickstart", *words])
    assert message in capsys.readouterr().err


def test_validation_patients_are_kept_apart_only_where_they_choose():
    """The published habit trains on the whole training part."""
    for words, fraction in (([], 0.2), (["--select_on", "test"], 0.0), (["--select_on", "last"], 0.0)):
        _, (data, _, _, training) = parse(["qlung-ast", *words])
        assert data.validation_fraction == fraction
        assert training.load_best_model_at_end == (words != ["--select_on", "last"])
    _, (data, _, _, training) = parse(["qlung-ast", "--select_on", "last", "--validation_fraction", "0.1"])
    assert data.validation_fraction == 0.1
    assert training.eval_strategy == "epoch"


def test_several_durations_end_with_the_duration():
    recipe, (data, *_) = parse(["quickstart", "--durations", "1", "2", "4"])
    assert (data.duration, data.durations) == (4.0, [1.0, 2.0, 4.0])
    assert (recipe.options["duration"], recipe.options["durations"]) == (4.0, [1.0, 2.0, 4.0])
    assert parse(["study-buckets"])[1][0].duration == 8.0
