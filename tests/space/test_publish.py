"""The Space's folder: whole, without anything of this machine, and running where the package is not installed."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import publish
import pytest
import soundfile
import torch
from huggingface_hub import SpaceCard

import modeling_qlung
from hf_datasets.hub import Repository
from modeling_qlung import QLungForAudioClassification
from modeling_qlung.quality_parameters_qlung import QUALITY_PARAMETERS
from tests.hub_stand_in import TOKEN, HubStandIn
from tests.test_published_files import open_elsewhere

from .conftest import ROOT, SPACE

MODEL = SPACE / "model"
# Answers one of the examples, and tells which modules it took from where.
ANSWER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import app
analysis = app.analyzer()(sys.argv[2])
page = app.build()
own = {name: module.__file__ for name, module in sys.modules.items() if getattr(module, "__file__", None)}
own = {name: path for name, path in own.items() if name.split(".")[0] in ("modeling_qlung", "hf_datasets", "figures")}
print(json.dumps({"modules": own, "duration": analysis.duration, "quality": analysis.quality}))
"""


@pytest.fixture
def written(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    publish.main(["--dry_run"])
    return tmp_path / "published" / "space"


def test_the_written_folder_runs_without_the_package(written, tmp_path):
    """Where `QLUNG_SPACE_PYTHON` names one, in an environment with the Space's requirements alone."""
    python = os.environ.get("QLUNG_SPACE_PYTHON", sys.executable)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "QLUNG_MODEL")}
    environment |= {"HF_HUB_OFFLINE": "1"}
    example = written / "sounds" / "simulated_crackles.flac"
    command = [python, "-P", "-c", ANSWER, str(written), str(example)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert {"modeling_qlung", "modeling_qlung.inference.analyzer", "figures"} <= set(answer["modules"])
    assert all(Path(path).is_relative_to(written) for path in answer["modules"].values())
    assert answer["duration"] == pytest.approx(soundfile.info(example).duration, abs=0.01)
    assert 0 <= answer["quality"] <= 1


def test_one_commit_uploads_it_and_nothing_of_this_machine(hub: HubStandIn, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    stale = {"modeling_qlung/old_qlung.py": b"", "notes.md": b"mine"}
    Repository("me/lungs", "space").create().push(stale, "Before")
    publish.main(["--repo_id", "me/lungs"])
    repository = hub.repositories["spaces/me/lungs"]
    assert len(repository.commits) == 2
    assert set(repository.files) == set(publish.space_files()) | {"notes.md"}
    assert not hub.leaks(tmp_path)
    assert "Uploaded: " in capsys.readouterr().out


def test_a_name_or_a_dry_run_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        publish.main([])
    assert "give --repo_id USER/NAME to upload to, or --dry_run" in capsys.readouterr().err


def test_it_asks_for_the_versions_that_are_tested():
    card = SpaceCard((SPACE / "README.md").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"gradio=={card.data.sdk_version}" in project["optional-dependencies"]["space"]
    known = {*project["dependencies"], *project["optional-dependencies"]["space"]}
    assert set((SPACE / "requirements.txt").read_text().split("\n")) - {""} <= known
    assert (SPACE / card.data.app_file).is_file()


def test_the_model_has_the_published_code():
    published = {path.name: path.read_text() for path in (ROOT / "modeling_qlung").glob("*_qlung.py")}
    assert {path.name: path.read_text() for path in MODEL.glob("*.py")} == published


def test_the_model_fits_and_opens_elsewhere(tmp_path):
    assert (MODEL / "model.safetensors").stat().st_size < 25e6
    folder = tmp_path / "model"
    folder.mkdir()
    for path in MODEL.iterdir():
        (folder / path.name).symlink_to(path)
    waveform = 0.1 * np.random.default_rng(0).standard_normal(20000)
    np.save(folder / "waveform.npy", waveform.astype(np.float32))
    result = open_elsewhere(folder, tmp_path)
    assert result["classes"] == ["QLungModel", "QLungForAudioClassification", "QLungFeatureExtractor"]
    assert sum(result["pipeline"].values()) == pytest.approx(1, abs=1e-5)
    assert {value.dtype for value in QLungForAudioClassification.from_pretrained(MODEL).state_dict().values()} == {
        torch.float32
    }


def test_the_model_in_the_box_carries_the_packages_own_code():
    package = Path(modeling_qlung.__file__).parent
    carried = sorted(path.name for path in (SPACE / "model").glob("*.py"))
    assert "quality_parameters_qlung.py" in carried
    assert [name for name in carried if (SPACE / "model" / name).read_bytes() != (package / name).read_bytes()] == []
    extractor = modeling_qlung.QLungFeatureExtractor.from_pretrained(SPACE / "model")
    assert extractor.quality_parameters == QUALITY_PARAMETERS
