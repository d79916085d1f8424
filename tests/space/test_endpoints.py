"""The running page as a program calls it."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest

from modeling_qlung.inference import LungSoundAnalyzer
from tests.space.conftest import SPACE

pytest.importorskip("gradio", reason="gradio is not installed: the page is not tested")
gradio_client = pytest.importorskip("gradio_client")

pytestmark = pytest.mark.slow


def client(address: str) -> Any:
    return gradio_client.Client(address, verbose=False)


def test_endpoints_answer_as_the_analyzer_does(address, checkpoint, record, tmp_path):
    path, handle = record(seconds=5.0), gradio_client.handle_file
    expected = LungSoundAnalyzer.from_pretrained(checkpoint)(path)
    found = client(address).predict(handle(path), api_name="/analyze")
    assert found["duration"] == 5.0
    np.testing.assert_allclose(found["probabilities"], expected.probabilities, atol=1e-3)
    (tmp_path / "a.txt").write_text("0.5\t2.5\t0\t0\n")
    found = client(address).predict(handle(path), 0.0, handle(tmp_path / "a.txt"), api_name="/analyze")
    assert [(span["start"], span["end"]) for span in found["spans"]] == [(0.5, 2.5)]
    found = client(address).predict(handle(path), handle(record("b.wav")), api_name="/compare")
    assert found["second"]["duration"] == 3.0
    assert found["can_tell"] == (found["first"]["can_tell"] and found["second"]["can_tell"])
    assert found["difference"]["abnormal"] == pytest.approx(
        found["second"]["summary"]["abnormal"] - found["first"]["summary"]["abnormal"], abs=1e-5
    )


def test_only_the_named_endpoints_are_offered(address):
    offered = client(address).view_api(return_format="dict")
    assert set(offered["named_endpoints"]) == {"/analyze", "/compare"}
    assert not offered["unnamed_endpoints"]
    names = [parameter["parameter_name"] for parameter in offered["named_endpoints"]["/analyze"]["parameters"]]
    assert names == ["recording", "threshold", "annotation"]


def test_bad_files_get_their_message_and_the_app_lives_on(address, record, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"not a sound " * 100)
    caller = client(address)
    for bad, message in (
        (tmp_path / "bad.wav", "bad.wav cannot be read as audio"),
        (record("short.wav", seconds=0.2), "lasts 0.200 s"),
    ):
        with pytest.raises(Exception, match=message) as caught:
            caller.predict(gradio_client.handle_file(bad), api_name="/analyze")
        assert "/" not in str(caught.value).replace("and/or", "")
    assert caller.predict(gradio_client.handle_file(record()), api_name="/analyze")["duration"] == 3.0


def test_a_file_of_the_server_is_not_read(address):
    secret = {"path": str(SPACE / "README.md"), "meta": {"_type": "gradio.FileData"}}
    call = f"{address}/gradio_api/call/analyze"
    body = json.dumps({"data": [secret, None, None]}).encode()
    with urlopen(Request(call, body, {"Content-Type": "application/json"}), timeout=20) as answer:
        event = json.load(answer)["event_id"]
    with urlopen(f"{call}/{event}", timeout=20) as answer:
        assert answer.read().decode().split() == ["event:", "error", "data:", '{"error":', "null}"]  # not even opened


def test_ten_people_at_once_get_their_own_answers(address, record):
    seconds = [2.0 + 0.5 * number for number in range(10)]
    paths = [record(f"{number}.wav", seconds=length) for number, length in enumerate(seconds)]
    ready = threading.Barrier(10)

    def ask(path: Path) -> float:
        caller = client(address)
        ready.wait()
        return caller.predict(gradio_client.handle_file(path), api_name="/analyze")["duration"]

    with ThreadPoolExecutor(10) as people:
        assert list(people.map(ask, paths)) == seconds
