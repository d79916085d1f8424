"""The page: a recording in, what a lung-sound model heard in it out. Run `python space/app.py`.

`QLUNG_MODEL` names another checkpoint, a Hub id or a folder; by default it is `model` beside this file.
"""

import base64
import functools
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # a clone's package; a Space has it beside this file

import examples
import figures
import gradio as gr
import numpy as np
import soundfile
import torch
import wording
from recordings import LARGEST_FILE, AnnotatedCycle, UnusableInputError, read_cycles, read_recording

from modeling_qlung.inference import Analysis, LungSoundAnalyzer, Span

try:
    import spaces
except ImportError:
    on_gpu = lambda function: function  # noqa: E731
else:  # ZeroGPU lends a device to what is decorated, for as long as it runs
    on_gpu = spaces.GPU(duration=60)

HERE = Path(__file__).resolve().parent
TIME_LIMIT = 180.0  # s that the model may take for one recording
LONGEST_CLIP = 60.0  # s
KEPT = 900  # s that an upload is kept, and a page's recording after its last use
MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # one at a time, in order
WAITING = 64  # requests
LAUNCH: dict[str, Any] = {
    "css_paths": HERE / "style.css",
    "theme": gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"]),
    "allowed_paths": [examples.FOLDER],
    "max_file_size": LARGEST_FILE,
    "footer_links": ["api", "gradio"],
    "ssr_mode": False,
    "state_session_capacity": WAITING,  # each caller's page is remembered, 0.2 MB without a recording
}
P = ParamSpec("P")
R = TypeVar("R")
NO_RESULT = '<p class="q-note">The result appears here.</p>'
USE = """```python
from gradio_client import Client, handle_file

client = Client("ADDRESS OF THIS PAGE")  # the Space's name, or http://127.0.0.1:7860
result = client.predict(handle_file("recording.wav"), api_name="/analyze")
result["spans"]  # [{"start": 1.5, "end": 3.0, "label": "crackle", "probability": 0.71, "peak": 0.93}, ...]
client.predict(handle_file("recording.wav"), 0.4, handle_file("recording.txt"), api_name="/analyze")  # cycles
client.predict(handle_file("before.wav"), handle_file("after.wav"), api_name="/compare")["difference"]
```"""


@dataclass(frozen=True, eq=False)
class Heard:
    """A recording that was analyzed, for as long as its page is open: 16-bit samples at the model's rate."""

    name: str
    samples: np.ndarray
    picture: figures.Picture
    analysis: Analysis
    annotated: list[AnnotatedCycle]
    annotation: str | None  # name of the file that told the cycles


@functools.cache
def analyzer() -> LungSoundAnalyzer:
    """The model, loaded once."""
    name = os.environ.get("QLUNG_MODEL") or HERE / "model"
    return LungSoundAnalyzer.from_pretrained(name, device="cuda" if torch.cuda.is_available() else "cpu")


def sampling_rate() -> int:
    """The model's, in Hz."""
    return analyzer().feature_extractor.sampling_rate


def on_device(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function where the model is. ZeroGPU does so in a process whose errors lose their words on the way."""

    @on_gpu
    def attempt(*args: P.args, **kwargs: P.kwargs) -> R | UnusableInputError:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            return UnusableInputError(str(error))

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        result = attempt(*args, **kwargs)
        if isinstance(result, UnusableInputError):
            raise result
        return result

    return run


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End what the model does between two batches, once its time is over. One request runs at a time.

    Raises:
        UnusableInputError: it took longer.
    """
    end = time.monotonic() + seconds

    def check(*_: Any) -> None:
        if time.monotonic() > end:
            raise UnusableInputError(
                f"The analysis took longer than {seconds:.0f} s and was ended. Try a shorter recording."
            )

    hook = analyzer().model.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


@on_device
def run_model(path: str, threshold: float | None, cycles: list[tuple[float, float]] | None) -> Analysis:
    """Analyze a file that was checked before."""
    with time_limit(TIME_LIMIT):
        return analyzer()(path, threshold=threshold, cycles=cycles)


@on_device
def run_attention(samples: np.ndarray, span: Span) -> np.ndarray:
    """Give the attention over one span, (frequency patches, time patches)."""
    with time_limit(TIME_LIMIT):
        return analyzer().attention(samples, span.start, span.end, sampling_rate())


def hear(path: str | None, threshold: float | None = None, annotation: str | None = None) -> Heard:
    """Read a recording, and its annotated cycles where they are given, and run the model.

    Raises:
        UnusableInputError: what was given cannot be analyzed; the message is for the person who gave it.
    """
    if not path:
        raise UnusableInputError("There is no recording yet. Upload or record one, or take an example.")
    if threshold is not None and not (type(threshold) in (int, float) and 0 <= threshold <= 1):
        raise UnusableInputError(f"The threshold is {threshold}; it must be from 0 to 1.")
    samples, own_rate = read_recording(path, sampling_rate())
    annotated = read_cycles(annotation, len(samples) / sampling_rate()) if annotation else []
    try:
        analysis = run_model(path, threshold, [(cycle.start, cycle.end) for cycle in annotated] or None)
    except UnusableInputError as error:
        raise UnusableInputError(str(error).replace(path, Path(path).name)) from error
    picture = figures.draw(samples, sampling_rate(), own_rate)
    return Heard(Path(path).name, samples, picture, analysis, annotated, annotation and Path(annotation).name)


def analyze(recording: str, threshold: float | None = None, annotation: str | None = None) -> dict[str, Any]:
    """Mark abnormal lung sounds in a recording of 0.3 s to 10 minutes.

    Args:
        recording: audio file of any rate.
        threshold: of P(abnormal), 0 to 1; the model's own where it is left out.
        annotation: ICBHI annotation file (start, end, crackles, wheezes); its cycles are scored instead of windows.

    Returns:
        Duration, spans, probabilities over time, summary, quality and its reasons. Times in seconds.
    """
    try:
        return hear(recording, threshold, annotation).analysis.to_dict()
    except UnusableInputError as error:
        raise gr.Error(str(error), print_exception=False) from error


def compare(first: str, second: str, threshold: float | None = None) -> dict[str, Any]:
    """Analyze two recordings, and give the difference of their summaries, the second less the first.

    `can_tell` is false where either recording cannot be judged, and the difference is then of no use.
    """
    analyses = [analyze(recording, threshold) for recording in (first, second)]
    before, after = (analysis["summary"] for analysis in analyses)
    difference = {name: round(after[name] - before[name], 6) for name in before}
    can_tell = all(analysis["can_tell"] for analysis in analyses)
    return {"first": analyses[0], "second": analyses[1], "difference": difference, "can_tell": can_tell}


def verdict(analysis: Analysis) -> str:
    """The sentence that stands first, with what it does not mean."""
    state = "" if analysis.can_tell else " q-unsure"
    return (
        f'<div class="q-verdict{state}"><strong>{escape(wording.verdict(analysis))}</strong>'
        f"{escape(wording.caution(analysis))}</div>"
    )


def refusal(message: str) -> str:
    """What stands in the verdict's place where there is none."""
    return f'<div class="q-verdict q-error"><strong>{escape(message)}</strong></div>'


def quality(analysis: Analysis) -> str:
    """The recording's quality with its reasons, and by parts where it has several."""
    meter = ""
    if analysis.quality is not None:
        meter = (
            f'<meter min="0" max="1" low="{analyzer().quality_threshold}" optimum="1" value="{analysis.quality:.2f}" '
            'aria-label="recording quality"></meter>'
        )
    parts = ""
    if len(analysis.quality_parts) > 1:
        rows = [
            [
                f"{part.start:.0f}–{part.end:.0f}",
                "–" if part.quality is None else f"{part.quality:.2f}",
                ", ".join(part.reasons) or "–",
            ]
            for part in analysis.quality_parts
        ]
        table = figures.table(["time, s", "quality", "what may be wrong"], rows, "Quality by parts")
        parts = f"<details><summary>Quality by parts</summary>{table}</details>"
    return f'<div class="q-quality"><h3>Quality</h3><p>{meter}{escape(wording.quality(analysis))}</p>{parts}</div>'


def details(heard: Heard) -> str:
    """Tables, quality and downloads."""
    return _span_table(heard.analysis) + _cycle_table(heard) + quality(heard.analysis) + _downloads(heard)


def _span_table(analysis: Analysis) -> str:
    rows = [
        [
            str(number),
            f"{span.start:.1f}–{span.end:.1f}",
            wording.sounds(span.label),
            f"{span.probability:.2f}",
            f"{span.peak:.2f}",
        ]
        for number, span in enumerate(analysis.spans, start=1)
    ]
    if not rows:
        return ""
    caption = "Places marked" if analysis.can_tell else "Places marked, not to be relied on"
    table = figures.table(["place", "time, s", "sound", "P(sound)", "P(any)"], rows, caption)
    return (
        f'{table}<p class="q-note">P(sound): mean probability of that sound. P(any): highest of any abnormal one.</p>'
    )


def _cycle_table(heard: Heard) -> str:
    if not heard.annotated:
        return ""
    analysis = heard.analysis
    given = ["normal" if mark < 0 else analysis.classes[mark] for mark in analysis.marks]
    agreeing = sum(cycle.label == label for cycle, label in zip(heard.annotated, given, strict=True))
    rows = [
        [f"{cycle.start:.1f}–{cycle.end:.1f}", cycle.label, label, f"{abnormal:.2f}"]
        for cycle, label, abnormal in zip(heard.annotated, given, analysis.abnormal, strict=True)
    ]
    caption = f"Annotated cycles: the model agrees on {agreeing} of {len(rows)}"
    table = figures.table(["time, s", "annotated", "model", "P(abnormal)"], rows, caption)
    recording, annotation = Path(heard.name).stem, Path(heard.annotation or "").stem
    if recording == annotation:
        return table
    return table + (
        f'<p class="q-note">The cycles are from {escape(annotation)}, and the recording is {escape(recording)}: are '
        "they of one another?</p>"
    )


def _downloads(heard: Heard) -> str:
    stem = Path(heard.name).stem
    content = {"recording": heard.name, **heard.analysis.to_dict()}
    files = [
        (f"{stem}_spans.csv", "text/csv", heard.analysis.to_csv(), "Places as CSV"),
        (f"{stem}_analysis.json", "application/json", json.dumps(content, indent=1), "Everything as JSON"),
    ]
    links = "".join(
        f'<a download="{escape(name)}" href="data:{kind};base64,{_base64(text.encode())}">{label}</a>'
        for name, kind, text, label in files
    )
    return f'<div class="q-downloads"><h3>Download</h3>{links}</div>'


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def clip(heard: Heard | None, index: int | None) -> str:
    """A player of one span's sound, raised to full level. It stands in the page itself: no file is written."""
    if heard is None or index is None or index >= len(heard.analysis.spans):
        return ""
    span, rate = heard.analysis.spans[index], sampling_rate()
    samples = heard.samples[int(span.start * rate) : int(min(span.end, span.start + LONGEST_CLIP) * rate)]
    raised = samples * (0.9 / max(1, np.abs(samples.astype(np.int32)).max()))
    file = io.BytesIO()
    soundfile.write(file, raised, rate, format="WAV", subtype="PCM_16")
    name = _place(index, span)
    return (
        f'<div class="q-clip"><audio controls preload="auto" aria-label="{escape(name)}" '
        f'src="data:audio/wav;base64,{_base64(file.getvalue())}"></audio></div>'
    )


def _place(index: int, span: Span) -> str:
    return f"{index + 1}: {wording.sounds(span.label)}, {span.start:.1f}–{span.end:.1f} s"


def attention(heard: Heard | None, index: int | None) -> str:
    """Where the model looked in one span."""
    if heard is None or index is None or index >= len(heard.analysis.spans):
        return ""
    span = heard.analysis.spans[index]
    try:
        found = run_attention(heard.samples, span)
    except UnusableInputError as error:  # an encoder without patches in time
        return refusal(str(error))
    return figures.attention_picture(found, heard.samples, sampling_rate(), heard.picture.top, span)


def marked(heard: Heard) -> tuple:
    """All that a threshold changes: verdict, operating point, figure, places to listen to, clip, attention, details."""
    analysis = heard.analysis
    choices = [(_place(index, span), index) for index, span in enumerate(analysis.spans)]
    return (
        verdict(analysis),
        f'<p class="q-note">{escape(wording.operating_point(analyzer().operating_points, analysis.threshold))}</p>',
        figures.timeline(heard.picture, analysis),
        gr.update(choices=choices, value=0 if choices else None),
        gr.update(visible=bool(choices)),
        clip(heard, 0),
        "",
        details(heard),
    )


def examine(path: str | None, annotation: str | None) -> tuple:
    """Analyze what was uploaded: the page's state, whether there are results, the slider, and `marked`."""
    try:
        heard = hear(path, annotation=annotation)
    except UnusableInputError as error:
        return None, gr.update(visible=False), gr.skip(), refusal(str(error)), *[gr.skip()] * 7
    return heard, gr.update(visible=True), heard.analysis.threshold, *marked(heard)


def move(heard: Heard | None, threshold: float) -> tuple:
    """Mark at another threshold; the model is not run again."""
    if heard is None:
        message = f"The recording is kept for {KEPT // 60} minutes at most, and is gone. Analyze it again."
        return None, refusal(message), *[gr.skip()] * 7
    heard = replace(heard, analysis=heard.analysis.at(threshold))
    return heard, *marked(heard)


def side_by_side(first: str | None, second: str | None) -> tuple[str, str, str]:
    """Two recordings in short, and their numbers in one table."""
    shown, summaries = [], []
    for path in (first, second):
        try:
            heard = hear(path)
        except UnusableInputError as error:
            shown.append(refusal(str(error)))
            continue
        analysis = heard.analysis
        shown.append(verdict(analysis) + figures.timeline(heard.picture, analysis) + quality(analysis))
        summaries.append(analysis)
    return shown[0], shown[1], _comparison(*summaries) if len(summaries) == 2 else ""


def _comparison(first: Analysis, second: Analysis) -> str:
    pair = (first.summary, second.summary)
    rows = [
        ["can be judged", *("yes" if analysis.can_tell else "no" for analysis in (first, second))],
        ["time marked", *(f"{100 * summary['share_abnormal']:.0f} %" for summary in pair)],
        ["any abnormal sound, highest probability", *(f"{summary['abnormal']:.2f}" for summary in pair)],
    ]
    rows += [
        [f"{wording.sounds(name)}, highest probability", *(f"{summary[name]:.2f}" for summary in pair)]
        for index, name in enumerate(first.classes)
        if index != first.normal
    ]
    if first.quality is not None and second.quality is not None:
        rows.append(["recording quality", f"{first.quality:.2f}", f"{second.quality:.2f}"])
    return figures.table(["", "first", "second"], rows, "The two recordings")


def build() -> gr.Blocks:
    """The page with its endpoints; the model is loaded."""
    analyzer()
    # Uploads are looked for every minute; those of people who left are removed like all others.
    with gr.Blocks(title="QLung: lung sounds", analytics_enabled=False, delete_cache=(60, KEPT)) as page:
        gr.HTML(
            '<div class="q-title"><h1>What is in this lung recording?</h1><p>Crackles and wheezes, where they are, how '
            "sure the model is, and whether the recording is good enough to tell.</p></div>"
        )
        points = analyzer().operating_points
        about = f"<p>{escape(points.about)} {escape(wording.evidence(points))}</p>" if points else ""
        gr.HTML(f'<div class="q-notice" role="note">{wording.NOT_A_DEVICE}{about}</div>')
        with gr.Tab("Recording"):
            _recording_tab()
        with gr.Tab("Compare", elem_id="compare"):
            _compare_tab()
        with gr.Accordion("About the model, privacy, and use from a program", open=False):
            gr.Markdown(_about())
        _endpoints()
        # A region that exists before it changes is read out when it does.
        page.load(None, js="() => { document.getElementById('verdict').setAttribute('role', 'status'); }")

        # Without this, what a closed page held would stay for an hour.
        def forget(request: gr.Request) -> None:
            page.state_holder.delete_state(request.session_hash)

        page.unload(forget)
    return page.queue(max_size=WAITING, default_concurrency_limit=4)


def _recording_tab() -> None:
    heard = gr.State(None, time_to_live=KEPT)
    with gr.Row():
        with gr.Column(scale=3):
            recording = _audio("Lung recording, 0.3 s to 10 minutes")
        with gr.Column(scale=2):
            gr.HTML(f'<p class="q-note">{examples.ABOUT}</p>')
            for name, path in examples.paths().items():
                gr.Button(name, size="sm").click(
                    functools.partial(str, path), None, recording, api_visibility="private", queue=False
                )
            with gr.Accordion("I have annotated cycles", open=False):
                annotation = gr.File(
                    label="ICBHI annotation file (.txt): start, end, crackles, wheezes",
                    file_types=[".txt"],
                    type="filepath",
                    height=120,
                )
    button = gr.Button("Analyze", variant="primary", elem_id="analyze")
    verdict_region = gr.HTML(NO_RESULT, elem_id="verdict")
    with gr.Column(visible=False) as results:
        figure = gr.HTML(elem_id="figure")
        slider = gr.Slider(
            0.01,
            0.99,
            step=0.01,
            label="Operating point: mark where the probability of an abnormal sound is at least",
            elem_id="threshold",
        )
        point = gr.HTML(elem_id="point")
        with gr.Column() as places:
            choice = gr.Dropdown([], label="Listen to a marked place", elem_id="choice")
            player = gr.HTML(elem_id="player")
            look = gr.Button("Show where the model looked", size="sm")
            map_ = gr.HTML(elem_id="attention")
        more = gr.HTML(elem_id="details")
    changed = [verdict_region, point, figure, choice, places, player, map_, more]
    recording.clear(lambda: None, None, annotation, queue=False, api_visibility="private")  # it was of that recording
    recording.change(  # what stands there was of another one
        lambda: (None, gr.update(visible=False), NO_RESULT),
        None,
        [heard, results, verdict_region],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    button.click(
        examine,
        [recording, annotation],
        [heard, results, slider, *changed],
        show_progress_on=verdict_region,
        api_visibility="private",
        **MODEL_QUEUE,
    )
    slider.input(
        move,
        [heard, slider],
        [heard, *changed],
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
    )
    choice.input(clip, [heard, choice], player, show_progress="hidden", api_visibility="private")
    choice.input(lambda: "", None, map_, queue=False, api_visibility="private")
    look.click(attention, [heard, choice], map_, api_visibility="private", **MODEL_QUEUE)


def _compare_tab() -> None:
    gr.HTML('<p class="q-note">Two recordings with the same settings, for example before and after treatment.</p>')
    with gr.Row():
        first, second = _audio("First recording"), _audio("Second recording")
    button = gr.Button("Compare", variant="primary")
    summary = gr.HTML(elem_id="comparison")
    with gr.Row():
        shown = [gr.HTML(elem_id="first", min_width=300), gr.HTML(elem_id="second", min_width=300)]
    button.click(
        side_by_side,
        [first, second],
        [*shown, summary],
        show_progress_on=summary,
        api_visibility="private",
        **MODEL_QUEUE,
    )


def _audio(label: str) -> gr.Audio:
    return gr.Audio(label=label, sources=["upload", "microphone"], type="filepath", editable=False, buttons=[])


def _endpoints() -> None:
    with gr.Row(visible=False):
        recording, second = gr.Audio(type="filepath"), gr.Audio(type="filepath")
        threshold, annotation, result = gr.Number(None), gr.File(type="filepath"), gr.JSON()
        trigger = gr.Button()
    trigger.click(analyze, [recording, threshold, annotation], result, api_name="analyze", **MODEL_QUEUE)
    trigger.click(compare, [recording, second, threshold], result, api_name="compare", **MODEL_QUEUE)


def _about() -> str:
    return (
        f"**Model.** It hears windows of {analyzer().window:g} s, one every "
        f"{analyzer().hop:g} s; at each moment the mean of those that cover it is shown.\n\n"
        f"**Privacy.** Recordings are analyzed on this machine, sent nowhere else, and removed within "
        f"{KEPT // 60 + 1} minutes. Nothing is logged or used for training.\n\n"
        f"**From a program.** `pip install gradio_client`, then:\n\n{USE}"
    )


if __name__ == "__main__":
    build().launch(**LAUNCH)
