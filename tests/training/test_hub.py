"""What `train.py --push_to_hub` sends: a whole run in one commit, that opens again, and nothing of this machine."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import ASTConfig, ASTModel, TrainingArguments

import train as train_script
from hf_datasets.hub import HubError, Repository
from modeling_qlung import QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.evaluation.model_card import RunDescription
from modeling_qlung.inference import LungSoundAnalyzer
from modeling_qlung.training.arguments import parse
from modeling_qlung.training.hub import main, repository_name, run_files
from tests.encoders import TINY_AST
from tests.hub_stand_in import TOKEN, HubStandIn, hub_stand_in, private_words
from tests.test_train_script import TINY
from tests.training.small_training import small_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A folder as a run leaves it, with what others may have put there."""
    folder = tmp_path / "runs" / "seed_1"
    small_model().save_pretrained(folder)
    QLungFeatureExtractor(duration=0.5).save_pretrained(folder)
    card = f'---\nlicense: apache-2.0\n---\n\nrepo = "{RunDescription.repo_id}"\n'
    texts = {"README.md": card, "recipe.yaml": "seed: 1\n", "metrics.json": "{}", "flatness.json": "{}"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("quality.png", "predictions.parquet", "training_args.bin", "optimizer.pt", "notes.txt", "own.py"):
        (folder / name).write_bytes(b"content of " + name.encode())
    (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint-1" / "model.safetensors").write_bytes(b"not the one")
    return folder


def test_exactly_a_runs_own_files_are_published(run_dir):
    files = run_files(run_dir, "me/lungs")
    code = {path.name for path in (ROOT / "modeling_qlung").glob("*_qlung.py")}
    checkpoint = {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert set(files) == code | checkpoint | {
        "README.md",
        "recipe.yaml",
        "metrics.json",
        "flatness.json",
        "quality.png",
    }
    assert files["model.safetensors"] == run_dir / "model.safetensors"
    assert files["README.md"] == b'---\nlicense: apache-2.0\n---\n\nrepo = "me/lungs"\n'
    assert RunDescription.repo_id in (run_dir / "README.md").read_text()


@pytest.mark.parametrize("name", ["metrics.json", "README.md", "model.safetensors"])
def test_a_run_that_has_not_ended_is_not_published(run_dir, name):
    (run_dir / name).unlink()
    lacking = "the weights" if name.startswith("model") else name
    with pytest.raises(FileNotFoundError, match=f"it lacks {lacking}: run it to its end first"):
        run_files(run_dir, "me/lungs")


def operating_points(rate: float) -> dict:
    rates = {"sensitivity": [1.0, 0.0], "specificity": [0.0, rate]}
    counts = {"abnormal": 1200, "normal": 3}
    interval = [rate / 2, 0.25, 0.75]
    scores = {**counts, "AUROC": [0.5, None, None], "sensitivity": interval, "specificity": interval}
    return {
        "about": "Measured here.", "window": 1.5, "hop": 0.5, "threshold": 0.5, "quality_threshold": 0.3, "patients": 1,
        "recordings": counts, "cycles": counts, "thresholds": [0.0, 1.0], "by_recording": rates, "by_cycle": rates,
        "level": None, "scores": [{"of": "patients kept apart", "recordings": scores, "cycles": scores}],
    }  # fmt: skip


def test_a_run_in_half_precision_opens_as_float32_and_answers_alike(run_dir, tmp_path):
    (run_dir / "operating_points.json").write_text(json.dumps(operating_points(1.0)))
    folder = tmp_path / "space" / "model"
    for _ in range(2):  # the second time in the place of the first
        main([str(run_dir), str(folder)])
    assert {path.name for path in folder.iterdir()} == set(run_files(run_dir, "model"))
    whole, half = (path.joinpath("model.safetensors").stat().st_size for path in (run_dir, folder))
    assert half < 0.6 * whole
    before, after = (QLungForAudioClassification.from_pretrained(path) for path in (run_dir, folder))
    assert {value.dtype for value in after.state_dict().values()} == {torch.float32}
    extractor = QLungFeatureExtractor.from_pretrained(folder)
    inputs = extractor(torch.randn(8000), sampling_rate=16000, return_tensors="pt")
    torch.testing.assert_close(before.eval()(**inputs).logits, after.eval()(**inputs).logits, atol=2e-2, rtol=0)
    card = (folder / "README.md").read_text()
    assert 'repo = "space/model"' in card
    assert "| patients kept apart | recordings | 1,200 | 3 | 50.0 | 50.0 (25.0–75.0) | 50.0 (25.0–75.0) |" in card
    assert "windows of 1.5 s" in card
    assert LungSoundAnalyzer.from_pretrained(folder).window == 0.5, "no longer than the model's input"
    main([str(folder), str(tmp_path / "again" / "model")])
    assert (tmp_path / "again" / "model" / "README.md").read_text() == card


def test_what_is_no_run_is_neither_read_nor_overwritten(run_dir, tmp_path):
    with pytest.raises(SystemExit, match="is there and is no published run: choose another"):
        main([str(run_dir), str(tmp_path)])
    with pytest.raises(SystemExit, match="is no run that has ended"):
        main([str(tmp_path), str(tmp_path / "model")])


def test_each_run_has_a_repository_of_its_own():
    folder = Path("runs/icbhi")
    assert repository_name("me/lungs", folder, folder) == "me/lungs"
    assert repository_name("me/lungs", folder / "seed_3", folder) == "me/lungs-seed-3"
    assert repository_name("me/lungs", folder / "fold_0" / "seed_3", folder) == "me/lungs-fold-0-seed-3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push_to_hub"], "--push_to_hub needs the repository's name: give --hub_model_id USER/NAME"),
        (["--hub_model_id=me/lungs"], "--hub_model_id changes nothing without --push_to_hub"),
        (["--hub_revision=trial"], "--hub_revision changes nothing without --push_to_hub"),
        (
            ["--push_to_hub", "--hub_model_id=me/lungs", "--hub_strategy=checkpoint"],
            "--hub_strategy changes nothing: a run is uploaded once, when it has ended",
        ),
    ],
)
def test_options_that_do_not_go_together(options, message, capsys):
    with pytest.raises(SystemExit):
        parse(["quickstart", *options])
    assert message in capsys.readouterr().err


def test_where_a_run_goes_is_no_part_of_what_it_is():
    options = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {name for name in options if name.startswith("hub_")} | {"push_to_hub"} <= train_script.OF_THE_MACHINE
    recipe, _ = parse(["quickstart", "--push_to_hub", "--hub_model_id=me/lungs", f"--hub_token={TOKEN}"])
    assert train_script.publishable(recipe.options, 1) == train_script.publishable(parse(["quickstart"])[0].options, 1)
    assert "me/lungs" not in json.dumps(train_script.about(recipe))


def test_a_benchmark_uploads_nothing(tmp_path):
    words = ["--benchmark", "quickstart", "--seeds", "1", f"--output_dir={tmp_path}", "--push_to_hub"]
    with pytest.raises(SystemExit, match="--benchmark uploads nothing"):
        train_script.benchmark([*words, "--hub_model_id=me/lungs"])


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    return [
        "quickstart",
        f"--output_dir={tmp_path / 'runs'}",
        "--push_to_hub",
        "--hub_model_id=me/lungs",
        "--seeds",
        "1",
    ]


def test_an_ended_run_is_uploaded_without_training(hub: HubStandIn, run_dir, asked, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_script, "run", lambda *_: {})
    monkeypatch.setattr(train_script, "summarize_seeds", lambda *_: {})
    monkeypatch.setattr(train_script, "format_table", lambda *_: "the table")
    train_script.train([*asked, "--hub_private_repo=true", "--hub_revision=trial"])
    repository = hub.repositories["models/me/lungs-seed-1"]
    assert repository.private
    assert repository.files == {}
    assert set(repository.branches["trial"]) == set(run_files(run_dir, ""))
    assert [commit["summary"] for commit in repository.commits] == ["Train quickstart"]
    assert not hub.leaks(tmp_path, TOKEN)
    assert "the table" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hub_token=hf_wrong"], r"^train.py: error: the Hub refuses .*HTTP 401"),
        (["--hub_model_id=you/lungs"], r"^train.py: error: the Hub refuses .*HTTP 403"),
        (["--hub_model_id=you/lungs/of"], "'you/lungs/of-seed-1' is no repository id"),
    ],
)
def test_a_wrong_name_or_token_is_told_before_training(options, message, hub: HubStandIn, asked, monkeypatch):
    monkeypatch.setattr(train_script, "run", lambda *_: pytest.fail("trained first"))
    with pytest.raises(SystemExit, match=message):
        train_script.train([*asked, *options])


def test_an_upload_that_fails_says_where_the_run_is(hub: HubStandIn, run_dir):
    repository = Repository("me/lungs", "model").create()
    del hub.repositories["models/me/lungs"]
    with pytest.raises(SystemExit, match=f"HTTP 404.* Nothing is lost: {run_dir} holds the whole run"):
        train_script.upload({run_dir: repository}, "Train")
    with pytest.raises(HubError):
        repository.push({}, "Nothing")


def test_the_trainer_is_not_told_of_the_hub(hub: HubStandIn, asked, monkeypatch):
    """It would push commits of its own, under its own card, and write the token into every checkpoint."""
    recipe, arguments = parse([*asked, f"--hub_token={TOKEN}"])
    run_dir = Path(str(arguments[3].output_dir)) / "seed_1"
    monkeypatch.setattr(train_script, "load_data", Mock(side_effect=ValueError("no data")))
    with pytest.raises(SystemExit, match="no data"):
        train_script.train_and_test(recipe, arguments, 1, run_dir, {})
    assert arguments[3].push_to_hub is False
    assert TOKEN not in repr(vars(arguments[3]))


def test_an_encoder_from_a_folder_leaves_no_trace_of_it(tmp_path):
    folder = tmp_path / "private-folder"
    torch.manual_seed(0)
    ASTModel(ASTConfig(**TINY_AST, max_length=98)).save_pretrained(folder)
    model = QLungForAudioClassification.from_audio_encoder(str(folder), num_frames=48)
    model.save_pretrained(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert not [word for word in private_words("private-folder") if word.encode() in path.read_bytes()], path.name


@pytest.mark.slow
def test_a_pushed_run_opens_from_the_hub(tmp_path):
    options = [*TINY, "--num_train_epochs=1", "--seeds", "1", f"--output_dir={tmp_path}/run"]
    hub_options = ["--push_to_hub", "--hub_model_id=me/lungs", f"--hub_token={TOKEN}", "--hub_private_repo=true"]
    train = [str(ROOT / "train.py"), "quickstart", *options, f"--cache_dir={tmp_path}/cache", *hub_options]
    # With the packages of this repository hidden, as for somebody who has only the name of the model.
    opened = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from open_checkpoint import Hide
sys.meta_path.insert(0, Hide())
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification
extractor = AutoFeatureExtractor.from_pretrained("me/lungs-seed-1", trust_remote_code=True)
model = AutoModelForAudioClassification.from_pretrained("me/lungs-seed-1", trust_remote_code=True).eval()
waveform = torch.sin(torch.arange(16000) / 7).numpy()
print(json.dumps(model(**extractor(waveform, sampling_rate=16000, return_tensors="pt")).logits.tolist()))
"""
    with hub_stand_in() as hub:
        for number, command in enumerate((train, ["-P", "-c", opened])):
            environment = hub.environment(tmp_path / "huggingface", TOKEN if number else None)
            done = subprocess.run(
                [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr[-4000:]
    repository = hub.repositories["models/me/lungs-seed-1"]
    assert repository.private
    assert len(repository.commits) == 1
    assert {"model.safetensors", "modeling_qlung.py", "metrics.json", "recipe.yaml"} <= set(repository.files)
    assert not [name for name in repository.files if name.endswith((".parquet", ".bin", ".pt"))]
    card = ModelCard(repository.files["README.md"].decode())
    metrics = json.loads(repository.files["metrics.json"])
    scored = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert scored["test", "score_4class"] == round(metrics["test"]["score_4class"], 2)
    assert 'repo = "me/lungs-seed-1"' in card.text
    assert yaml.safe_load(repository.files["recipe.yaml"])["seed"] == 1
    assert not hub.leaks(tmp_path, TOKEN)
    for path in (path for path in (tmp_path / "run").rglob("*") if path.is_file()):
        assert TOKEN.encode() not in path.read_bytes(), path
    model = QLungForAudioClassification.from_pretrained(tmp_path / "run" / "seed_1").eval()
    extractor = QLungFeatureExtractor.from_pretrained(tmp_path / "run" / "seed_1")
    waveform = torch.sin(torch.arange(16000) / 7).numpy()
    with torch.no_grad():
        expected = model(**extractor(waveform, sampling_rate=16000, return_tensors="pt")).logits
    assert torch.equal(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected)
