"""`train.py` as a researcher runs it: in a process of its own, killed, resumed, on real recordings."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import train as train_script
from hf_datasets.icbhi import _FOLD_OF as FOLD_OF
from modeling_qlung.evaluation import icbhi_scores
from modeling_qlung.evaluation.tasks import TASKS
from modeling_qlung.training.arguments import parse, recipe_names
from tests.test_published_files import open_elsewhere

ROOT = Path(__file__).parents[1]
TINY = [
    "--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2", "--intermediate_size=32",
    "--disable_tqdm=true", "--duration=1.0", "--simulated_patients=20",
]  # fmt: skip


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """Datasets are built and decoded once for all runs."""
    return tmp_path_factory.mktemp("datasets")


def start(cache: Path, *options: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), *options, f"--cache_dir={cache}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def train(cache: Path, *options: str) -> str:
    process = start(cache, *options)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-4000:]
    return output


def train_here(cache: Path, *options: str) -> str:
    """The same in this process, where it is not what is tested: starting one takes ten seconds."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train_script.main([*options, f"--cache_dir={cache}"])
    return output.getvalue()


@pytest.fixture(scope="session")
def two_seeds(shared_cache, tmp_path_factory):
    """Two seeds of a small sharpness-aware QLung on simulated sounds."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    options = ["quickstart", *TINY, "--num_train_epochs=2", "--sharpness=sam", "--ema_decay=0.9", "--seeds", "1", "2"]
    output = train(shared_cache, *options, f"--output_dir={folder}")
    return folder, options, output


@pytest.mark.slow
def test_a_run_leaves_everything_that_its_readers_need(two_seeds):
    folder, _, output = two_seeds
    run = folder / "seed_1"
    names = {path.name for path in run.iterdir()}
    published = ("configuration", "feature_extraction", "filterbank", "modeling", "pretrained")
    code = {f"{name}_qlung.py" for name in (*published, "quality", "quality_parameters")}
    of_each = ("confusion_matrix", "risk_coverage")
    figures = {f"{name}_{split}.png" for name in of_each for split in ("test", "validation")}
    figures |= {"training_curves.png", "quality.png"}
    files = {"config.json", "preprocessor_config.json", "model.safetensors", "metrics.json", "predictions.parquet"}
    assert names == code | figures | files | {"README.md", "recipe.yaml"}

    predictions = pd.read_parquet(run / "predictions.parquet")
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics) == ["validation", "test"]
    test = predictions[predictions["split"] == "test"]
    assert len(test) == 120
    assert test["row_id"].is_unique
    assert test["quality"].between(0, 1).all()
    assert test["quality"].std() > 0.05, "percentiles of the training set give the quality spread"
    logits = test["logits"].tolist()
    predicted = [max(range(4), key=row.__getitem__) for row in logits]
    expected = icbhi_scores(test["label"].to_numpy(int), predicted)
    for name in ("specificity", "sensitivity_4class", "score_4class", "sensitivity_2class", "score_2class", "recall"):
        assert metrics["test"][name] == expected[name]
    low, high = metrics["test"]["ci95"]["score_4class"]
    assert low <= metrics["test"]["score_4class"] <= high
    patients = {split: set(rows["patient_id"]) for split, rows in predictions.groupby("split")}
    assert not patients["test"] & patients["validation"]

    summary = json.loads((folder / "summary.json").read_text())["test"]["score_4class"]
    values = [json.loads((folder / f"seed_{s}" / "metrics.json").read_text())["test"]["score_4class"] for s in (1, 2)]
    assert summary["values"] == values
    assert f"{summary['mean']:.2f}" in output


@pytest.mark.slow
def test_the_card_tells_what_was_done(two_seeds):
    folder, _, _ = two_seeds
    card = ModelCard.load(folder / "seed_2" / "README.md")
    assert card.data.eval_results
    for part in (
        "`quickstart`: QLung's loss and head on simulated lung sounds",
        "Changed: duration 1.0, ema_decay 0.9, hidden_size 16",
        "sharpness: sam",
        "Seed 2",
        "validation patients, none of whom is in the training part",
        "accelerate launch train.py recipe.yaml\n",
        "normalization: percentile",
        "Not a medical device",
    ):
        assert part in card.text, part
    for file in [path for path in (folder / "seed_2").rglob("*") if path.is_file()]:
        assert str(folder.parent).encode() not in file.read_bytes(), f"{file.name} names a folder of this machine"


@pytest.mark.slow
def test_the_checkpoint_opens_where_the_package_is_not(two_seeds, tmp_path):
    import numpy as np

    folder, _, _ = two_seeds
    run = folder / "seed_1"
    np.save(run / "waveform.npy", np.random.default_rng(0).standard_normal(9000).astype("float32") * 0.1)
    result = open_elsewhere(run, tmp_path)
    (run / "waveform.npy").unlink()
    assert result["classes"] == ["QLungModel", "QLungForAudioClassification", "QLungFeatureExtractor"]
    assert sum(result["pipeline"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_an_ended_run_is_read_and_another_one_refused(two_seeds, shared_cache):
    folder, options, output = two_seeds
    before = (folder / "seed_1" / "model.safetensors").stat().st_mtime_ns
    again = train_here(shared_cache, *options, f"--output_dir={folder}")
    assert again.splitlines()[-2:] == output.splitlines()[-2:]
    assert (folder / "seed_1" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match=r"holds a run with other options \(rho None → 0\.2\): choose another"):
        train_here(shared_cache, *options, "--rho=0.2", f"--output_dir={folder}")


@pytest.mark.slow
def test_its_own_recipe_makes_the_same_run_again(two_seeds, shared_cache, tmp_path):
    folder, _, _ = two_seeds
    recipe = folder / "seed_2" / "recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["seed"] == 2
    train(shared_cache, str(recipe), f"--output_dir={tmp_path / 'again'}")
    one, other = (load_file(path / "model.safetensors") for path in (folder / "seed_2", tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights(shared_cache, tmp_path):
    options = [
        "quickstart", *TINY, "--num_train_epochs=6", "--save_strategy=steps", "--eval_strategy=steps",
        "--save_steps=7", "--eval_steps=7", "--sharpness=looksam", "--ema_decay=0.9", "--sampling_power=1",
        "--dropout=0.2",
    ]  # fmt: skip
    train(shared_cache, *options, f"--output_dir={tmp_path / 'whole'}")
    process = start(shared_cache, *options, f"--output_dir={tmp_path / 'killed'}")
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints / "checkpoint-14").is_dir():
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    train(shared_cache, *options, f"--output_dir={tmp_path / 'killed'}")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    different = [name for name in whole if not (whole[name] == resumed[name]).all()]
    assert whole.keys() == resumed.keys()
    assert not different, f"{len(different)} of {len(whole)} parameters differ"
    for name in ("metrics.json", "predictions.parquet"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.slow
def test_sharpness_under_fsdp_is_refused(shared_cache, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "train.py"), "quickstart", *TINY, "--max_steps=1", "--sharpness=sam", "--use_cpu=true",
         "--fsdp=full_shard", "--ddp_backend=gloo", f"--cache_dir={shared_cache}", f"--output_dir={tmp_path / 'run'}"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    assert "FSDP shards the parameters, and --sharpness" in done.stderr


@pytest.mark.slow
def test_two_processes_predict_every_cycle_once(shared_cache, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "train.py"), "quickstart", *TINY, "--num_train_epochs=1", "--sharpness=sam",
         "--use_cpu=true", "--ddp_backend=gloo", f"--cache_dir={shared_cache}", f"--output_dir={tmp_path / 'run'}"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    predictions = pd.read_parquet(tmp_path / "run" / "predictions.parquet")
    assert predictions.groupby("split")["row_id"].nunique().to_dict() == {"test": 120, "validation": 80}
    assert len(predictions) == 200
    assert done.stdout.count("quickstart, 1 run") == 1, "only the first process speaks"


@pytest.mark.slow
def test_quickstart_learns(tmp_path):
    """The README's main job, as it stands there: nothing at hand but the package."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "train.py", "quickstart"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    begin = time.monotonic()
    done = subprocess.run(
        [*command, f"--output_dir={tmp_path / 'run'}"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    print(f"quickstart: {time.monotonic() - begin:.0f} s, score (4-class) {scores['score_4class']:.1f}")
    # Always answering "normal" scores 50, with no sensitivity.
    assert scores["score_4class"] > 58
    assert scores["sensitivity_4class"] > 35


def test_a_cpu_is_used_whole_under_a_launcher(monkeypatch):
    """`accelerate launch` and torchrun set OMP_NUM_THREADS=1."""
    import torch

    from train import use_all_cores

    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    use_all_cores()
    assert given == [], "a thread count that the user set himself stays"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    use_all_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    use_all_cores()
    assert given == [8, 2]


NARROW_AST = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
NARROW_CLAP = {
    "patch_embeds_hidden_size": 16, "hidden_size": 64, "depths": [1, 1, 1], "num_attention_heads": [1, 2, 2],
    "projection_hidden_size": 64,
}  # fmt: skip


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """AudioSet's AST and LAION's CLAP in shape, narrow in width."""
    from transformers import ASTConfig, ASTForAudioClassification, ClapConfig, ClapModel, ClapTextConfig

    folder = tmp_path_factory.mktemp("pretrained")
    ASTForAudioClassification(ASTConfig(**NARROW_AST, num_labels=527)).save_pretrained(folder / "ast")
    text = ClapTextConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, projection_hidden_size=16
    )
    clap = ClapConfig(text_config=text.to_dict(), audio_config={**NARROW_CLAP, "projection_dim": 16}, projection_dim=16)
    ClapModel(clap).save_pretrained(folder / "clap")
    return folder


def number_of_items(annotation: Path, task) -> int:
    return 1 if task.config == "recordings" else len(json.loads(annotation.read_text())["event_annotation"])


def options_of_few_steps(recipe, data_dir: Path, pretrained: Path) -> list[str]:
    """Four steps of a recipe as it is, on what is at hand."""
    _, (args, model, method, _) = parse([recipe])
    options = ["--max_steps=4", "--disable_tqdm=true", "--allow_missing_audio=true", "--per_device_eval_batch_size=16"]
    options += ["--simulated_patients=20"] if args.dataset == "simulated" else [f"--data_dir={data_dir}"]
    if args.dataset == "icbhi" and method.select_on == "validation":
        options += ["--select_on=last"]  # so few patients leave too little to choose by
    if args.dataset != "simulated" and method.select_on != "test":
        options += ["--save_strategy=no", "--eval_strategy=no"]
    else:
        options += ["--save_strategy=steps", "--save_steps=2", "--eval_strategy=steps", "--eval_steps=2"]
    if model.encoder is not None:
        options += [f"--encoder={pretrained / ('clap' if 'clap' in model.encoder else 'ast')}"]
    return options if args.dataset == "icbhi" else [*options, "--validation_fraction=0", "--select_on=last"]


@pytest.fixture(scope="session")
def some_of_sprsound(real_sprsound, tmp_path_factory):
    """Every fifteenth recording, and those with something rare: all of them take minutes."""
    rare = ('"Rhonchi"', '"Stridor"', '"Coarse Crackle"', '"Wheeze+Crackle"', '"CAS & DAS"')
    folder = tmp_path_factory.mktemp("sprsound") / "BioCAS2022"
    for annotations in ("train2022_json", "test2022_json/intra_test_json"):
        wavs = annotations.split("_")[0] + "_wav"
        (folder / annotations).mkdir(parents=True)
        (folder / wavs).mkdir()
        for number, path in enumerate(sorted((real_sprsound / "BioCAS2022" / annotations).glob("*.json"))):
            if number % 15 and not any(name in path.read_text() for name in rare):
                continue
            (folder / annotations / path.name).symlink_to(path)
            wav = real_sprsound / "BioCAS2022" / wavs / f"{path.stem}.wav"
            (folder / wavs / wav.name).symlink_to(wav)
    return folder.parent


@pytest.fixture(scope="session")
def both(real_icbhi, some_of_sprsound, tmp_path_factory):
    """One folder with both datasets."""
    folder = tmp_path_factory.mktemp("both")
    for path in (*real_icbhi.iterdir(), *some_of_sprsound.iterdir()):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_takes_real_steps(recipe, both, some_of_sprsound, pretrained, shared_cache, tmp_path, capsys):
    """On real recordings, with weights of narrow encoders in the pretrained ones' shape."""
    run_dir = tmp_path / "run"
    options = options_of_few_steps(recipe, both, pretrained)
    train_script.main([recipe, *options, f"--output_dir={run_dir}", f"--cache_dir={shared_cache}"])
    assert f"\n{recipe}, 1 run, in {run_dir}\n" in capsys.readouterr().out
    _, (args, model, method, _) = parse([recipe])
    task, scores = TASKS[args.task], json.loads((run_dir / "metrics.json").read_text())
    card = (run_dir / "README.md").read_text()
    for split in scores.values():
        assert split.keys() >= task.titles.keys()
        assert list(split["support"]) == list(task.classes)
    if args.dataset == "icbhi":
        assert "864 of 920 recordings lack their audio" in card
        assert "Published in" not in card, "scores of another training set stand beside nothing published"
        assert sum(scores["test"]["support"].values()) == 91
        assert ("**The epoch was chosen on the TEST part" in card) == (method.select_on == "test")
    if args.dataset == "sprsound":
        intra = scores["test_intra"]
        items = sum(intra["support"].values()) + intra["unlabelled"]
        annotated = sum(number_of_items(path, task) for path in some_of_sprsound.rglob("intra_test_json/*.json"))
        assert items == annotated or args.windows
        assert intra["unlabelled"] == 0 or (args.task == "4-class" and not args.windows)
    if model.encoder is not None:
        assert "fine-tuned from `" in card
    for file in [path for path in run_dir.rglob("*") if path.is_file()]:
        for folder in (tmp_path, pretrained):
            assert str(folder).encode() not in file.read_bytes(), f"{file.name} names a folder of this machine"


@pytest.mark.slow
def test_folds_are_respirenets_and_cover_every_cycle_once(real_icbhi, pretrained, shared_cache, tmp_path, capsys):
    """Of the cycles at hand, the official split forgotten, each is tested in one fold alone."""
    train_script.main(
        ["ast-ce", f"--data_dir={real_icbhi}", "--allow_missing_audio=true", "--max_steps=1", "--save_strategy=no",
         f"--encoder={pretrained / 'ast'}", "--select_on=last", "--duration=1", "--disable_tqdm=true",
         "--folds", "0", "1", "2", "3", "4", f"--cache_dir={shared_cache}", f"--output_dir={tmp_path}"]
    )  # fmt: skip
    capsys.readouterr()
    tests = [pd.read_parquet(tmp_path / f"fold_{fold}" / "predictions.parquet") for fold in range(5)]
    together = pd.concat(tests)
    assert len(together) == together["row_id"].nunique() == 442 + 91
    for fold, test in enumerate(tests):
        assert {FOLD_OF[patient] for patient in test["patient_id"]} == {fold}
        recipe = yaml.safe_load((tmp_path / f"fold_{fold}" / "recipe.yaml").read_text())
        assert recipe["fold"] == fold
        assert f"fold {fold}" in recipe["about"]["description"], "it stands for no row of the official split"
    assert json.loads((tmp_path / "summary.json").read_text())["test"]["score_4class"]["n"] >= 4


@pytest.mark.slow
def test_windows_of_two_datasets_are_trained_on_and_no_validation_patient_is(both, shared_cache):
    options = [f"--data_dir={both}", "--allow_missing_audio=true", f"--cache_dir={shared_cache}"]
    _, (arguments, *_) = parse(["breath-small", *options])
    data = train_script.load_data(arguments, seed=3, sampling_rate=16000)
    rows = data.train.remove_columns("waveform").to_pandas()
    kept_apart = set(data.validation["patient_id"][:])
    assert not kept_apart & set(rows["patient_id"])
    for patients in (kept_apart, set(rows["patient_id"])):
        assert {len(patient) for patient in patients} == {3, 8}, "ICBHI's names have 3 digits, SPRSound's have 8"
    assert "864 of 920 recordings lack" in data.missing
    assert list(data.held_out) == ["validation", "test_intra", "icbhi:test"]
    assert rows["label"].isin(range(4)).all()
    assert all(len(window) == 32000 for window in data.validation["waveform"][:100])


@pytest.mark.slow
def test_a_checkpoint_is_scored_on_any_dataset(both, shared_cache, tmp_path):
    """Out of distribution; by its own run, and afterwards with the preparation that it was trained with."""
    run_dir, out = tmp_path / "runs" / "own", tmp_path / "scores"
    shared = [f"--data_dir={both}", "--allow_missing_audio=true"]
    own = train_here(
        shared_cache, "quickstart", *TINY, "--num_train_epochs=1", "--as_published", "preparation", *shared,
        "--also_test", "icbhi:test", "sprsound:test_inter", f"--output_dir={run_dir}",
    )  # fmt: skip
    assert "| icbhi:test | 1 |" in own
    assert "sprsound:test_inter" not in own, "what is not at hand is left out"
    parts = ["sprsound:test_intra", "icbhi:test", "simulated:test"]
    output = train_here(shared_cache, "--evaluate", str(run_dir), "--on", *parts, *shared, f"--output_dir={out}")
    after, before = (json.loads((folder / "metrics.json").read_text()) for folder in (out, run_dir))
    assert list(after) == parts
    assert after["icbhi:test"] == before["icbhi:test"]
    assert after["simulated:test"]["confusion_matrix"] == before["test"]["confusion_matrix"]
    unlabelled = after["sprsound:test_intra"]["unlabelled"]
    assert f"({unlabelled} without label) |" in output
    assert unlabelled == 16, "every rhonchus and stridor is among those taken"
    figures = {f"confusion_matrix_{part.replace(':', '_')}.png" for part in parts}
    assert {path.name for path in out.glob("*.png")} == figures | {"embedding_map.png", "attention.png"}


def benchmark_options(cache, folder):
    rows = ["quickstart", "quickstart,loss=cross_entropy"]
    few = [*TINY, "--num_train_epochs=2", "--inspect_cycles=32"]
    words = ["--benchmark", *rows, "--seeds", "1", "2", *few, f"--output_dir={folder}"]
    return words, rows


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_and_runs_nothing_twice(shared_cache, tmp_path):
    words, rows = benchmark_options(shared_cache, tmp_path)
    process = start(shared_cache, *words)
    first = tmp_path / rows[0] / "seed_1" / "metrics.json"
    deadline = time.monotonic() + 200
    while not first.is_file():
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate()
    before = first.stat().st_mtime_ns
    output = train(shared_cache, *words)
    assert first.stat().st_mtime_ns == before
    for row in rows:
        for seed in (1, 2):
            run_dir = tmp_path / row / f"seed_{seed}"
            assert json.loads((run_dir / "flatness.json").read_text())["num_cycles"] == 32
            assert {"embedding_map.png", "attention.png"} < {path.name for path in run_dir.iterdir()}
            assert (run_dir / "metrics.json").is_file()
    assert output.strip() == (tmp_path / "table.md").read_text().strip()
    assert "### simulated test, 4-class" in output
    assert "loss qlung → cross_entropy" in output
    table = pd.read_csv(tmp_path / "table.csv")
    compared = table[(table["row"] == rows[1]) & (table["score"] == "score_4class")].iloc[0]
    scores = [json.loads((tmp_path / rows[1] / f"seed_{s}" / "metrics.json").read_text())["test"] for s in (1, 2)]
    assert compared["mean"] == pytest.approx(sum(score["score_4class"] for score in scores) / 2)
    assert compared["difference_low"] <= compared["difference"] <= compared["difference_high"]


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_does_not_stop_the_others(shared_cache, tmp_path):
    words, rows = benchmark_options(shared_cache, tmp_path)
    words = [word for word in words if word not in (*rows[1:], "2")]
    words.insert(2, "quickstart,encoder=/nowhere/ast")
    process = start(shared_cache, *words)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert errors.count("There is no folder /nowhere/ast") == 1
    assert "1 of 2 runs failed; the same command tries them again." in errors
    assert "### simulated test, 4-class" in output


@pytest.mark.slow
def test_unlabelled_events_are_predicted_counted_and_never_scored(real_sprsound, shared_cache, tmp_path):
    train_here(
        shared_cache, "sprsound-small", f"--data_dir={real_sprsound}", *TINY, "--max_steps=2", "--save_strategy=no",
        f"--output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics) == ["test_intra"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "patients are in the training part too" in card
    assert "This run did not use recording quality." in card
    assert metrics["test_intra"]["unlabelled"] == 16
    assert sum(metrics["test_intra"]["support"].values()) == 1004 - 16
    assert len(pd.read_parquet(tmp_path / "run" / "predictions.parquet")) == 1004


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no-such-recipe"], "There is no recipe 'no-such-recipe'. Choose one of"),
        (["quickstart", "--validation_fraction=0"], "--select_on validation needs validation patients"),
        (["quickstart", "--rho=0.1"], "--rho changes nothing without --sharpness"),
        (["quickstart", "--ema_decay=1.5"], "--ema_decay is 1.5; it must be in [0, 1)"),
        (["quickstart", "--task=three-class"], "there is no task 'three-class': choose one of 4-class, two-output"),
        (["quickstart", "--fold=1"], "--fold 1: there are the folds 0 to 4, of icbhi"),
        (["ast-ce", "--folds", "0", "5"], "--fold 5: there are the folds 0 to 4, of icbhi"),
        (["quickstart", "--as_published", "luck"], "--as_published luck: the faults known are preparation"),
        (["clap-ce", "--as_published", "preparation"], "for Kaldi's front end alone"),
        (["quickstart", "--objective=mixup"], "there is no objective 'mixup': choose one of supervised"),
        (["quickstart", "--mix_beta=2"], "--mix_beta is no option of the objective supervised"),
        (["--benchmark", "quickstart,rho", "--seeds", "1"], "'quickstart,rho': 'rho' is not option=value"),
        (
            ["--benchmark", "study", "--seeds", "1", "--data_dir=/nowhere"],
            "--data_dir /nowhere: there is no such folder",
        ),
        (
            ["--benchmark", "quickstart", "--seeds", "1", "--baseline=ce"],
            "--baseline ce is none of the rows quickstart",
        ),
        (["--evaluate", "x", "--on", "icbhi"], "--on icbhi: name dataset and split, such as sprsound:test_inter"),
        (["--evaluate", "/nowhere/run", "--on", "simulated:test"], "/nowhere/run is neither a folder nor on the Hub"),
        (["sprsound-2-1", "--data_dir=/nowhere"], "give the folder that holds BioCAS2022 as data_dir"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        train_script.main(options)
    said = str(ended.value.code) if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert message in said.splitlines()[-1], said


def test_what_goes_wrong_late_ends_the_process_in_one_sentence(tmp_path):
    options = ["quickstart", "--simulated_patients=2", "--encoder=/nowhere/ast", f"--output_dir={tmp_path / 'run'}"]
    process = start(tmp_path / "cache", *options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "There is no folder /nowhere/ast" in errors.splitlines()[-1], errors[-2000:]
