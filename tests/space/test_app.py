"""The page's functions."""

import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from modeling_qlung.inference import LungSoundAnalyzer
from tests.space.conftest import ROOT, SPACE

gradio = pytest.importorskip("gradio", reason="gradio is not installed: the page is not tested")


@pytest.fixture(scope="module")
def app(checkpoint):
    import app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLUNG_MODEL", str(checkpoint))
        app.analyzer.cache_clear()
        yield app
        app.analyzer.cache_clear()


@pytest.fixture
def heard(app, record) -> Any:
    """A recording with something marked, and with something not."""
    first = app.hear(str(record(seconds=6.0)))
    return app.replace(first, analysis=first.analysis.at(float(np.median(first.analysis.abnormal))))


def links(page: str) -> dict[str, str]:
    """Contents of the downloads by name."""
    found = re.findall(r'download="([^"]+)" href="data:[\w/]+;base64,([\w+/=]+)"', page)
    return {name: base64.b64decode(content).decode() for name, content in found}


def test_downloads_hold_what_the_page_shows(app, heard):
    files = links(app.details(heard))
    rows = list(csv.DictReader(io.StringIO(files["noise_spans.csv"])))
    assert [(float(row["start_s"]), row["label"]) for row in rows] == [
        (span.start, span.label) for span in heard.analysis.spans
    ]
    content = json.loads(files["noise_analysis.json"])
    assert content["recording"] == "noise.wav"
    assert content["spans"] == heard.analysis.to_dict()["spans"]


def test_a_clip_is_the_spans_sound(app, heard):
    span = heard.analysis.spans[0]
    content = re.search(r"data:audio/wav;base64,([\w+/=]+)", app.clip(heard, 0))
    assert content is not None
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(content[1])))
    assert len(samples) / rate == pytest.approx(span.end - span.start, abs=1e-3)
    original = heard.samples[int(span.start * rate) : int(span.end * rate)]
    assert np.corrcoef(samples, original)[0, 1] > 0.999
    assert np.abs(samples).max() == pytest.approx(0.9, abs=1e-3)
    assert app.clip(heard, len(heard.analysis.spans)) == app.clip(heard, None) == app.clip(None, 0) == ""


def test_another_threshold_does_not_run_the_model(app, heard, monkeypatch):
    monkeypatch.setattr(app, "run_model", None)
    moved, verdict, point, *_ = app.move(heard, 1.0)
    assert "Nothing abnormal was marked" in verdict
    assert point.startswith('<p class="q-note">At 1.00, on 50 validation patients')
    again, verdict, *_ = app.move(moved, 0.0)
    assert "were marked" in verdict
    assert again.analysis.probabilities is heard.analysis.probabilities
    assert "Analyze it again" in app.move(None, 0.5)[1]


def test_on_zero_gpu_the_model_runs_in_a_process_of_its_own_and_errors_keep_their_words(checkpoint, record, tmp_path):
    """A stand-in of `spaces`: like it, it forks, pickles what goes in and out, and passes an error's name alone."""
    (tmp_path / "spaces.py").write_text("""
import functools, multiprocessing, os, pickle
ran = []
def GPU(duration):
    def decorate(function):
        def run(*args):
            context = multiprocessing.get_context("fork")
            queue = context.SimpleQueue()
            def work():
                try:
                    result = function(*pickle.loads(pickle.dumps(args)))
                except Exception as error:
                    result = RuntimeError(type(error).__name__)
                queue.put((os.getpid(), result))
            context.Process(target=work).start()
            process, result = queue.get()
            ran.append(process)
            if isinstance(result, RuntimeError):
                raise result
            return result
        return lambda *args, **kwargs: run(*args, *kwargs.values())
    return decorate
""")
    script = f"""
import os, sys
sys.path.insert(0, {str(SPACE)!r})
import app, numpy, spaces
heard = app.hear(sys.argv[1], 0.0)
numpy.testing.assert_allclose(heard.analysis.probabilities, app.analyzer()(sys.argv[1]).probabilities, atol=1e-6)
assert "data:image/webp" in app.attention(heard, 0)
app.TIME_LIMIT = -1.0
try:
    app.hear(sys.argv[1])
except app.UnusableInputError as error:
    print(error)
assert len(spaces.ran) == 3 and os.getpid() not in spaces.ran, spaces.ran
"""
    # One thread: a process forked from one whose OpenMP threads run waits for these for ever.
    environment = {**os.environ, "QLUNG_MODEL": str(checkpoint), "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, record()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "took longer than -1 s and was ended. Try a shorter recording." in done.stdout


def test_no_more_sessions_are_remembered_than_may_wait(app):
    page = app.build()
    page.launch(prevent_thread_lock=True, quiet=True, server_port=None, **app.LAUNCH)
    try:
        for number in range(app.WAITING + 20):
            assert page.state_holder[str(number)] is page.state_holder[str(number)]
        assert app.WAITING <= len(page.state_holder.session_data) <= app.WAITING + 1
        assert str(app.WAITING + 19) in page.state_holder
    finally:
        page.close()


def test_annotated_cycles_are_scored_and_compared(app, record, tmp_path):
    (tmp_path / "a.txt").write_text("0.5\t2.5\t0\t0\n2.5\t5.25\t1\t1\n")
    result = app.hear(str(record(seconds=6.0)), annotation=str(tmp_path / "a.txt"))
    np.testing.assert_allclose(result.analysis.edges, [[0.5, 2.5], [2.5, 5.25]])
    page = app.details(result)
    assert "the model agrees on" in page
    assert "<td>2.5–5.2</td><td>both</td>" in page
    assert "The cycles are from a, and the recording is noise: are they of one another?" in page
    (tmp_path / "a.txt").rename(tmp_path / "noise.txt")
    result = app.hear(str(record(seconds=6.0)), annotation=str(tmp_path / "noise.txt"))
    assert "are they of one another" not in app.details(result)


def test_attention_is_drawn_over_the_span(app, heard):
    page = app.attention(heard, 0)
    span = heard.analysis.spans[0]
    assert f"{span.start:.1f} to {span.end:.1f} seconds" in page
    assert page.count("data:image/webp") == 2
    assert app.attention(heard, len(heard.analysis.spans)) == "", "the slider has moved in between"


@pytest.mark.parametrize(
    ("path", "threshold", "message"),
    [
        (None, None, "no recording yet"),
        ("noise.wav", 1.5, "The threshold is 1.5"),
        ("noise.wav", "x", "The threshold is x"),
        ("none.wav", None, "not kept"),
    ],
)
def test_what_cannot_be_heard_is_said(app, record, path, threshold, message):
    folder = record().parent
    with pytest.raises(app.UnusableInputError, match=message):
        app.hear(str(folder / path) if path else None, threshold)


def test_a_cycle_without_a_sample_is_refused(app, record, tmp_path):
    (tmp_path / "a.txt").write_text("0.00001\t0.00002\t0\t0\n")
    with pytest.raises(app.UnusableInputError, match="From 1e-05 to 2e-05 s"):
        app.hear(str(record()), annotation=str(tmp_path / "a.txt"))


def test_time_limit_ends_the_model_and_is_lifted(app, record, monkeypatch):
    path = str(record())
    monkeypatch.setattr(app, "TIME_LIMIT", -1.0)
    with pytest.raises(app.UnusableInputError, match="took longer"):
        app.hear(path)
    monkeypatch.undo()
    assert app.analyzer()(path).duration == 3.0


def test_names_are_escaped(app, record):
    heard = app.hear(str(record("<b>&.wav")))
    assert "<b>&amp;" not in app.details(heard)
    assert "&lt;b&gt;&amp;_spans.csv" in app.details(heard)


def test_silence_is_heard_and_nothing_is_told(app, record):
    heard = app.hear(str(record(level=0.0)))
    assert "I can’t tell" in app.verdict(heard.analysis)


def test_examples_are_small_and_named_simulated(app):
    paths = app.examples.paths()
    assert len(paths) == 3
    for name, path in paths.items():
        assert "imulated" in name
        assert Path(path).stat().st_size < 100_000
        assert 5 < soundfile.info(path).duration < 16
        assert LungSoundAnalyzer.from_pretrained(SPACE / "model")(path).can_tell


def test_examples_are_what_the_simulator_makes(app, monkeypatch, tmp_path):
    monkeypatch.setattr(app.examples, "FOLDER", tmp_path)
    committed = [
        soundfile.read(SPACE / "sounds" / file, dtype="int16")[0] for file, *_ in app.examples.EXAMPLES.values()
    ]
    app.examples.synthesize()
    for before, path in zip(committed, app.examples.paths().values(), strict=True):
        assert np.abs(before.astype(int) - soundfile.read(path, dtype="int16")[0]).max() <= 1  # rounding of another FFT


def test_the_spaces_files_are_in_step():
    header = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert header["sdk"] == "gradio"
    assert header["sdk_version"] == gradio.__version__
    assert (SPACE / header["app_file"]).is_file()
    assert "gradio" not in (SPACE / "requirements.txt").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    for line in (SPACE / "requirements.txt").read_text().split():
        if not line.startswith("pillow"):
            assert f'"{line}"' in project
