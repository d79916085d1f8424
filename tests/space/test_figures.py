"""The page's figures: what stands where."""

import base64
import io
import re

import figures
import numpy as np
import pytest
from PIL import Image

from modeling_qlung.inference import Span
from tests.space.test_wording import B, C, N, W, analysis

RATE = 16000


def tone(hertz: float, seconds: float, start: float = 0.0) -> np.ndarray:
    """Silence, from `start` on a tone."""
    times = np.arange(round(seconds * RATE)) / RATE
    return np.where(times >= start, 10000 * np.sin(2 * np.pi * hertz * times), 0).astype(np.int16)


def pixels(html: str, number: int = 0) -> np.ndarray:
    """Brightness of an image in a page, the highest row first."""
    content = re.findall(r"data:image/webp;base64,([\w+/=]+)", html)[number]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("L"))


@pytest.mark.parametrize(("hertz", "tick"), [(250, "250"), (1000, "1,000"), (2000, "2,000")])
def test_a_tone_is_drawn_at_its_frequency_and_time(hertz, tick):
    picture = figures.draw(tone(hertz, 4.0, start=2.0), RATE, RATE)
    page = figures.timeline(picture, analysis(*[N] * 8))
    image = pixels(page)
    found = re.search(rf'top:([\d.]+)%">{tick}<', page)
    assert found is not None
    place = float(found[1])
    row = image[:, 3 * image.shape[1] // 4].argmax()
    assert abs(100 * (row + 0.5) / image.shape[0] - place) < 2
    bright = image[row] > 200
    assert 0.48 < bright.argmax() / image.shape[1] < 0.51


def test_a_long_recording_is_drawn_in_as_many_columns_as_a_screen_shows():
    samples = tone(500, 95.0)
    whole = figures.mel_spectrogram(samples, RATE, 4000.0)
    assert whole.shape[1] == 1200
    # blocks of 10 s are seamless: the frames around 10 s are those of a recording that has no seam there
    part = figures.mel_spectrogram(samples[9 * RATE : 12 * RATE], RATE, 4000.0)
    seam = figures.mel_spectrogram(samples[: 12 * RATE], RATE, 4000.0)
    np.testing.assert_allclose(seam[:, 901:1100], part[:, 1:200], atol=1e-3)


def test_less_than_a_frame_is_drawn_too():
    assert figures.mel_spectrogram(tone(500, 0.01), RATE, 4000.0).shape[1] == 1


def test_nothing_above_half_the_own_rate_is_shown():
    assert figures.draw(tone(500, 1.0), RATE, 4000).top == 2000
    assert figures.draw(tone(500, 1.0), RATE, 44100).top == 4000


@pytest.mark.parametrize("samples", [np.zeros(4800, np.int16), np.full(4800, -32768, np.int16)])
def test_silence_is_drawn(samples):
    assert figures.draw(samples, RATE, RATE).outline.startswith("M0 ")


def test_spans_stand_at_their_times_with_letters_and_patterns():
    page = figures.timeline(figures.draw(tone(500, 2.0), RATE, RATE), analysis(N, C, W, B))
    for name, letter, left in (("crackle", "C", 25), ("wheeze", "W", 50), ("both", "B", 75)):
        place = f'<span class="q-span q-{name}" style="left:{left}.00%;width:25.00%">'
        assert page.count(place) == 4  # one in each lane
        assert f"{place}<b>{letter}</b>" in page
    assert "crackles from 0.5 to 1.0 seconds; wheezes from 1.0 to 1.5 seconds" in page
    assert "q-doubtful" not in page


def test_what_cannot_be_relied_on_is_pale_and_nothing_is_said_so():
    picture = figures.draw(tone(500, 2.0), RATE, RATE)
    assert "q-doubtful" in figures.timeline(picture, analysis(C, can_tell=False))
    assert "<i>nothing</i>" in figures.timeline(picture, analysis(N))


def test_curves_break_between_cycles_and_the_threshold_is_drawn():
    picture = figures.draw(tone(500, 2.0), RATE, RATE)
    edges = np.array([[0.0, 0.5], [0.5, 1.0], [1.5, 2.0]])
    page = figures.timeline(picture, analysis(N, C, W, edges=edges, duration=2.0, cycles=True, threshold=0.3))
    curve = re.search(r'class="q-crackle" d="([^"]+)"', page)
    assert curve is not None
    assert curve[1] == "M0.0 90.0H250.0V30.0H500.0M750.0 90.0H1000.0"
    assert 'class="q-threshold" d="M0 70.0H1000"' in page


@pytest.mark.parametrize(
    ("seconds", "labels"),
    [
        (0.3, ["0.0", "0.1", "0.2", "0.3"]),
        (9.2, ["0", "2", "4", "6", "8"]),
        (90.0, ["0:00", "0:20", "0:40", "1:00", "1:20"]),
        (600.0, ["0:00", "2:00", "4:00", "6:00", "8:00", "10:00"]),
    ],
)
def test_time_axis(seconds, labels):
    page = figures.timeline(figures.Picture("", 1, "", 4000.0), analysis(N, duration=seconds))
    axis = re.search(r'<div class="q-time">(.*?)</div>', page)
    assert axis is not None
    assert re.findall(r">([\d.:]+)</span>", axis[1]) == labels


def test_attention_lies_over_its_place():
    attention = np.zeros((8, 12))
    attention[1, 9] = 1.0  # low, late
    span = Span(1.0, 2.0, "crackle", 0.5, 0.6)
    page = figures.attention_picture(attention, tone(500, 3.0), RATE, 8000.0, span)
    heat = pixels(page, 1)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(row / heat.shape[0] - (1 - 1.5 / 8)) < 0.07
    assert abs(column / heat.shape[1] - 9.5 / 12) < 0.07
    assert "1.0 to 2.0 seconds" in page


def test_tables_escape_what_people_bring():
    assert "<script>" not in figures.table(["a"], [["<script>"]], "<script>")
