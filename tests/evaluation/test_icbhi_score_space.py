"""The metric as an `evaluate` Space: what is uploaded loads from the Hub by name, and its page computes the scores."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard

from tests.hub_stand_in import HubStandIn

ROOT = Path(__file__).parents[2]
METRIC = ROOT / "modeling_qlung/evaluation/icbhi_score"
EXAMPLE = {"predictions": [0, 1, 2, 0], "references": [0, 1, 1, 0]}  # Sp 100 %, Se 50 % (4-class), 100 % (2-class)


def run(code: str, folder: Path, environment: dict[str, str]) -> str:
    """Run code where this package cannot be found; gives what it printed last."""
    outside = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture
def published(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    from modeling_qlung.evaluation.icbhi_score.__main__ import main

    monkeypatch.setattr(sys, "argv", ["icbhi_score", "--repo_id=me/icbhi_score"])
    main()
    repository = hub.repositories["spaces/me/icbhi_score"]
    assert len(repository.commits) == 1
    return repository.files


@pytest.mark.slow
def test_the_uploaded_metric_loads_by_its_name(published, hub: HubStandIn, tmp_path):
    code = f"import evaluate, json; print(json.dumps(evaluate.load('me/icbhi_score').compute(**{EXAMPLE})))"
    scores = json.loads(run(code, tmp_path, hub.environment(tmp_path / "huggingface", None)))
    assert (scores["specificity"], scores["score_4class"], scores["score_2class"]) == (100, 75, 100)
    assert scores["confusion_matrix"] == [[2, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_the_space_holds_the_metric_and_its_page(published, hub: HubStandIn, tmp_path):
    assert set(published) == {"README.md", "app.py", "icbhi_score.py", "requirements.txt", "scores.py"}
    assert not hub.leaks(tmp_path)


def test_the_space_asks_for_the_versions_that_are_tested(published):
    card = SpaceCard(published["README.md"].decode())
    assert 'evaluate.load("me/icbhi_score")' in card.text
    assert {"evaluate", "metric"} <= set(card.data.tags)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"gradio=={card.data.sdk_version}" in extras["space"]
    pinned = [line for line in published["requirements.txt"].decode().splitlines() if "==" in line]
    assert pinned
    assert set(pinned) <= set(extras["train"])
    assert (METRIC / card.data.app_file).is_file()


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [("me/score", "wants the module's own name, USER/icbhi_score"), ("you/icbhi_score", "HTTP 403")],
)
def test_another_name_is_refused(repo_id, message, hub: HubStandIn, monkeypatch, capsys):
    from modeling_qlung.evaluation.icbhi_score.__main__ import main

    monkeypatch.setattr(sys, "argv", ["icbhi_score", f"--repo_id={repo_id}"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert message in f"{caught.value} {capsys.readouterr().err}"
    assert not hub.repositories


def test_the_page_computes_the_scores(tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: the metric's page is not tested")
    folder = tmp_path / "app"  # a Space's folder has another name than the metric
    folder.mkdir()
    for name in ("app.py", "icbhi_score.py", "scores.py"):
        (folder / name).write_bytes((METRIC / name).read_bytes())
    code = f"""
import json, sys
sys.path.insert(0, {str(folder)!r})
import app, gradio_client
_, address, _ = app.demo.launch(prevent_thread_lock=True, ssr_mode=False, quiet=True)
page = gradio_client.Client(address, verbose=False)
scores, details = page.predict("normal, crackle, wheeze, 0", "normal crackle 1\\n0", api_name="/score")
messages = []
for predictions in ("normal, squawk", "normal"):
    try:
        page.predict(predictions, "normal normal", api_name="/score")
    except gradio_client.exceptions.AppError as error:
        messages.append(str(error))
print(json.dumps([scores, details, messages]))
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    scores, details, messages = json.loads(
        run(code, folder, {**os.environ, **offline, "HF_HOME": str(tmp_path / "hf")})
    )
    assert (scores["specificity"], scores["score_4class"], scores["score_2class"]) == (100, 75, 100)
    assert details["support"] == {"normal": 2, "crackle": 2, "wheeze": 0, "both": 0}
    assert messages[0] == "'squawk' is no class: give normal, crackle, wheeze, both, or 0 to 3"
    assert "1" in messages[1]
    assert "2" in messages[1]
