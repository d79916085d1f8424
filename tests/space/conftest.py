"""The page on a tiny checkpoint, in a process of its own as people start it, and recordings to bring."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import soundfile
import torch

from modeling_qlung import QLungConfig, QLungFeatureExtractor, QLungForAudioClassification
from tests.encoders import TINY_AST

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "space"
sys.path.insert(0, str(SPACE))  # a Space's modules are top-level ones

THRESHOLDS = [0.0, 0.5, 1.0]


def save_checkpoint(folder: Path) -> Path:
    """A tiny model with random weights; P(abnormal) of what it hears is near its threshold of 0.5."""
    torch.manual_seed(0)
    extractor = QLungFeatureExtractor(duration=2.0, quality_score="learned")
    config = QLungConfig(
        audio_config={"model_type": "audio-spectrogram-transformer", **TINY_AST, "max_length": extractor.max_length},
        head="linear",
        id2label={0: "normal", 1: "crackle", 2: "wheeze", 3: "both"},
    )
    model = QLungForAudioClassification(config)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    rates = {"sensitivity": [1.0, 0.8, 0.0], "specificity": [0.0, 0.7, 1.0]}
    points = {
        "about": "Measured on nobody.",
        "window": 2.0,
        "hop": 0.5,
        "threshold": 0.5,
        "quality_threshold": 0.0,
        "patients": 50,
        "recordings": {"abnormal": 120, "normal": 1260},
        "cycles": {"abnormal": 300, "normal": 900},
        "thresholds": THRESHOLDS,
        "by_recording": rates,
        "by_cycle": {name: [value / 2 for value in values] for name, values in rates.items()},
        "level": None,
        "scores": [],
    }
    (folder / "operating_points.json").write_text(json.dumps(points))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def address(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `python space/app.py` answers, with no network but this machine's own."""
    folder = tmp_path_factory.mktemp("app")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nowhere = {
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        **nowhere,
        "QLUNG_MODEL": str(checkpoint),
        "HF_HUB_OFFLINE": "1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "PYTHONPATH": "",
    }
    log = (folder / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, SPACE / "app.py"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, process, Path(log.name))
        yield url
        said = Path(log.name).read_text()
        assert said.count("Traceback") == said.count("InvalidPathError: "), said  # one test asks for the server's files
    finally:
        process.terminate()
        process.wait(timeout=20)
        log.close()


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        try:
            urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
    pytest.fail(f"the page did not start:\n{log.read_text()}")


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Path]:
    """Write noise as a recording, and give its path."""

    def write(name: str = "noise.wav", seconds: float = 3.0, rate: int = 8000, channels: int = 1, level: float = 0.1):
        samples = level * np.random.default_rng(0).standard_normal((round(seconds * rate), channels))
        soundfile.write(tmp_path / name, samples.clip(-1, 1), rate)
        return tmp_path / name

    return write
