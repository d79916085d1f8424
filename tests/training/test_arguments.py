import dataclasses

import pytest
import yaml

from modeling_qlung.training.arguments import ARGUMENTS, parse, read_recipe, recipe_names


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
    ],
)
def test_a_wrong_recipe_is_named(tmp_path, content, message):
    (tmp_path / "wrong.yaml").write_text(content)
    with pytest.raises(SystemExit, match=message):
        parse([str(tmp_path / "wrong.yaml")])


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
    parse([name])
    about = read_recipe(name).about
    assert about["description"].endswith(".")
    assert about.keys() <= {"description", "source", "published", "unknown"}
    assert ("published" in about) == ("source" in about)
    for score, value in about.get("published", {}).items():
        assert score in ("specificity", "sensitivity_4class", "score_4class", "sensitivity_2class", "score_2class")
        assert 0 < float(str(value).split("±")[0]) < 100


def test_the_issued_options_make_the_same_run_again(tmp_path):
    recipe, arguments = parse(["sam-ast", "--rho", "0.1"])
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump({"about": recipe.about, **recipe.options}))
    again, same = parse([str(path)])
    assert again.options == recipe.options
    for one, other in zip(arguments[:3], same[:3], strict=True):
        assert one == other
