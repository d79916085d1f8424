"""A saved folder in the hands of somebody who does not have this package."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForAudioClassification, pipeline

from modeling_qlung import QLungConfig, QLungFeatureExtractor, QLungForAudioClassification, QLungModel

from .encoders import TINY_AST, TINY_CLAP

PACKAGE = Path(__file__).parents[1] / "modeling_qlung"
PUBLISHED = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")

ENCODER = {**TINY_AST, "max_length": 98}
# By their front end; in the second, the waveform of 0.77 s takes the shorter of two lengths.
CHECKPOINTS = {
    "kaldi": (QLungFeatureExtractor(duration=1.0), {"audio_config": ENCODER}),
    "two durations": (
        QLungFeatureExtractor(duration=1.0, durations=[0.8, 1.0]),
        {"audio_config": ENCODER, "input_frames": [78, 98]},
    ),
    "clap": (QLungFeatureExtractor(front_end="clap", duration=1.0), {"audio_config": TINY_CLAP}),
}


def open_elsewhere(folder: Path, workdir: Path, *more: str, python: str = sys.executable) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(workdir / "modules"), "OMP_NUM_THREADS": "2"}
    command = [python, "-P", str(Path(__file__).with_name("open_checkpoint.py")), str(folder), *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=workdir, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.set_num_threads(2)
    extractor, options = CHECKPOINTS[request.param]
    model = QLungForAudioClassification(QLungConfig(**options, class_priors=[0.4, 0.3, 0.2, 0.1])).eval()
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    waveform = (0.1 * np.random.default_rng(0).standard_normal(12345)).astype(np.float32)
    np.save(folder / "waveform.npy", waveform)
    return folder, model, extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt")


def test_opens_every_way_with_equal_bits(checkpoint, tmp_path):
    folder, model, inputs = checkpoint
    again = tmp_path / "again"
    for source, target in ((folder, again), (again, tmp_path / "third")):
        (tmp_path / source.name).mkdir(exist_ok=True)
        if source is again:
            np.save(again / "waveform.npy", np.load(folder / "waveform.npy"))
        result = open_elsewhere(source, tmp_path, str(target))
        assert result["config"] == ["QLungConfig", [0.4, 0.3, 0.2, 0.1]]
        assert result["classes"] == ["QLungModel", "QLungForAudioClassification", "QLungFeatureExtractor"]
        output = model(**inputs)
        assert result["logits"] == output.logits.tolist()
        assert result["embedding"] == output.pooler_output.tolist()
        expected = dict(
            zip(("normal", "crackle", "wheeze", "both"), output.logits[0].softmax(-1).tolist(), strict=True)
        )
        assert result["pipeline"] == expected


def test_a_pipeline_takes_batches_of_several_lengths():
    """Which it pads with zeros: each waveform is scored as it is alone."""
    extractor, options = CHECKPOINTS["two durations"]
    model = QLungForAudioClassification(QLungConfig(**options)).eval()
    torch.nn.init.normal_(model.qlung.encoder.embeddings.position_embeddings)
    classify = pipeline("audio-classification", model=model, feature_extractor=extractor)
    rng = np.random.default_rng(0)
    waveforms = [rng.standard_normal(samples).astype(np.float32) for samples in (15000, 9000, 16000, 20000, 5000)]
    alone, together = classify(waveforms, batch_size=1), classify(waveforms, batch_size=5)
    for one, other in zip(alone, together, strict=True):
        assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
        assert [entry["score"] for entry in one] == pytest.approx([entry["score"] for entry in other], abs=1e-6)


def test_a_broken_torchaudio_is_named(tmp_path):
    """As PyPI's torchaudio is beside a CPU-only torch: installed, and its library does not load."""
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("raise OSError('libc10_cuda.so: cannot open shared object')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", "import modeling_qlung"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "does not load beside torch" in done.stderr.splitlines()[-1]
    assert "pip install 'torch==2.11.0' 'torchaudio==2.11.0'" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_opens_in_the_minimal_environment(checkpoint, tmp_path):
    """CPU torch of another version and Transformers, without torchaudio: what a user of a checkpoint has."""
    python = os.environ.get("QLUNG_MINIMAL_PYTHON")
    if not python:
        pytest.skip("QLUNG_MINIMAL_PYTHON names no interpreter of an environment with torch and transformers alone")
    folder, model, inputs = checkpoint
    for package in ("torchaudio", "datasets", "soundfile"):
        found = subprocess.run([python, "-c", f"import {package}"], capture_output=True)
        assert found.returncode != 0, f"{package} is in the minimal environment"
    result = open_elsewhere(folder, tmp_path, python=python)
    torch.testing.assert_close(torch.tensor(result["logits"]), model(**inputs).logits, atol=1e-4, rtol=0)
    assert result["pipeline"].keys() == {"normal", "crackle", "wheeze", "both"}


def test_the_folder_names_every_auto_class_and_carries_safetensors_only(checkpoint):
    folder, _, _ = checkpoint
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_qlung.QLungConfig",
        "AutoModel": "modeling_qlung.QLungModel",
        "AutoModelForAudioClassification": "modeling_qlung.QLungForAudioClassification",
    }
    names = {path.name for path in folder.iterdir()} - {"waveform.npy"}
    code = {path.name for path in PUBLISHED}
    assert names == code | {"config.json", "preprocessor_config.json", "model.safetensors"}


def test_a_saved_base_model_opens_as_a_classifier_with_a_new_head(tmp_path):
    base = QLungModel(QLungConfig(audio_config=ENCODER))
    base.save_pretrained(tmp_path)
    loaded, info = AutoModelForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"head.weight"}
    assert torch.equal(loaded.qlung.encoder.embeddings.position_embeddings, base.encoder.embeddings.position_embeddings)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForAudioClassification"}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_files_import_only_what_a_user_has(path):
    """Everywhere in the file: Transformers counts imports inside functions as required too."""
    allowed = {"torch", "numpy", "transformers"} | set(sys.stdlib_module_names)
    siblings = {published.stem for published in PUBLISHED}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {name.name.split(".")[0] for name in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").split(".")[0] in allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1
            assert node.module in siblings, "only `from .file import name` is followed"
