"""The page's figures, as HTML that follows the reader's screen, theme and font size.

One time axis in percent of the width carries every panel, so that nothing is drawn again for a phone or for the dark.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from PIL import Image
from wording import sounds

from modeling_qlung.filterbank_qlung import KaldiFilterbank
from modeling_qlung.inference import Analysis, Span

_COLUMNS = 1200  # of a picture: more than a wide screen shows
_BANDS, _TOP_HZ = 128, 4000.0  # above lies nothing of a lung sound, and nothing at all in many stethoscopes' files
_BLOCK = 10.0  # s of spectrogram that are computed at a time
_SHADES = np.array([[10, 17, 32], [30, 62, 110], [88, 138, 184], [190, 213, 228], [255, 255, 255]], dtype=float)
_HEAT = np.array([[255, 196, 0, 0], [255, 196, 0, 90], [255, 170, 0, 190]], dtype=float)  # with transparency
LETTERS = {"crackle": "C", "wheeze": "W", "both": "B"}


@dataclass(frozen=True)
class Picture:
    """What of a recording's figure no threshold changes: its outline and its spectrogram.

    Args:
        outline: path of an SVG, (0, -1) to (columns, 1).
        columns: width of the outline's path.
        spectrogram: address of an image, as `<img src>` takes it.
        top: highest frequency of the spectrogram, in Hz.
    """

    outline: str
    columns: int
    spectrogram: str
    top: float


def draw(samples: np.ndarray, sampling_rate: int, own_rate: int) -> Picture:
    """Draw a recording once.

    Args:
        samples: 16-bit, (n,).
        sampling_rate: of the samples, in Hz.
        own_rate: that it was recorded at, in Hz; there is nothing above half of it.
    """
    top = min(_TOP_HZ, sampling_rate / 2, own_rate / 2)
    columns = min(_COLUMNS, len(samples))
    pieces = np.linspace(0, len(samples), columns + 1).astype(int)[:-1]
    scale = max(1, int(np.abs(samples.astype(np.int32)).max()))
    high, low = (function.reduceat(samples, pieces) / scale for function in (np.maximum, np.minimum))
    there = [f"{x} {-y:.3f}" for x, y in enumerate(high)]
    back = [f"{x} {-y:.3f}" for x, y in zip(range(columns - 1, -1, -1), low[::-1], strict=True)]
    return Picture(
        f"M{'L'.join(there + back)}Z", columns, _image(_shade(mel_spectrogram(samples, sampling_rate, top))), top
    )


def mel_spectrogram(samples: np.ndarray, sampling_rate: int, top: float) -> np.ndarray:
    """Log-mel energies up to `top` Hz, (bands, columns), low frequencies first; at most 1,200 columns.

    Kaldi's filterbank, as before the model; of long recordings, the mean of neighbouring frames.
    """
    bank, bands = KaldiFilterbank(sampling_rate, _BANDS), _bands_below(top, sampling_rate)
    samples = np.pad(samples, (0, max(0, bank.frame_length - len(samples))))
    frames = bank.num_frames(len(samples))
    stride = round(_BLOCK * sampling_rate / bank.hop_length)  # frames of a block
    found = []
    for first in range(0, frames, stride):
        count = min(stride, frames - first)
        start = first * bank.hop_length
        part = samples[start : start + (count - 1) * bank.hop_length + bank.frame_length]
        waveform = torch.from_numpy(part.astype(np.float32) / 32768)
        found.append(bank(waveform[None])[0, :, :bands].numpy())
    values = np.concatenate(found)
    columns = min(_COLUMNS, len(values))
    pieces = np.linspace(0, len(values), columns + 1).astype(int)
    return (np.add.reduceat(values, pieces[:-1]) / np.diff(pieces)[:, None]).T


def _bands_below(top: float, sampling_rate: int) -> int:
    return round(_BANDS * _height(top) / _height(sampling_rate / 2))


def _height(hertz: float) -> float:
    """Kaldi's mel scale from its lowest frequency, 20 Hz."""
    return 1127.0 * float(np.log((700 + hertz) / 720))


def _shade(values: np.ndarray) -> np.ndarray:
    """Colour values (bands, columns) dark to light, from their 20th percentile, mostly noise, to the 99.7th."""
    low, high = np.percentile(values, [20, 99.7])
    return _ramp((values - low) / max(high - low, 1e-6), _SHADES)


def _ramp(values: np.ndarray, colours: np.ndarray) -> np.ndarray:
    places = np.linspace(0, 1, len(colours))
    channels = [np.interp(values, places, channel) for channel in colours.T]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _image(pixels: np.ndarray) -> str:
    """Encode (rows, columns, channels), the lowest row first, as an image that stands in the page itself."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[::-1])).save(file, "webp", quality=85, method=2)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def timeline(picture: Picture, analysis: Analysis) -> str:
    """Draw a recording and what was marked in it, on one time axis.

    Args:
        picture: of the recording.
        analysis: of the same; where nothing can be told, what is marked is pale.

    Returns:
        HTML of a figure: marks, waveform, mel spectrogram, probabilities; described in words for screen readers.
    """
    marks = "".join(_mark(span, analysis.duration) for span in analysis.spans)
    named = "".join(_mark(span, analysis.duration, f"<b>{_letter(span.label)}</b>") for span in analysis.spans)
    state = "" if analysis.can_tell else " q-doubtful"
    lanes = [
        _lane("Marked", "q-marks", named or "<i>nothing</i>"),
        _lane("Waveform, scaled to its loudest moment", "q-wave", _outline(picture) + marks),
        _lane(
            "Mel spectrogram, Hz",
            "q-dark",
            f'<img src="{picture.spectrogram}" alt="">{marks}',
            _frequency_ticks(picture.top),
        ),
        _lane("Probability of each sound", "q-probability", _curves(analysis) + marks, _probability_ticks()),
    ]
    return (
        f'<figure class="q-figure{state}"><div role="img" aria-label="{escape(described(analysis))}">{"".join(lanes)}'
        f"{_time_axis(0, analysis.duration)}</div><figcaption>{_legend(analysis)}</figcaption></figure>"
    )


def described(analysis: Analysis) -> str:
    """Say what the figure shows, for those who do not see it."""
    places = [f"{sounds(span.label)} from {span.start:.1f} to {span.end:.1f} seconds" for span in analysis.spans]
    return (
        f"Waveform, mel spectrogram and probabilities over {analysis.duration:.1f} seconds. Marked: "
        f"{'; '.join(places) or 'nothing'}. Highest probability of an abnormal sound: "
        f"{analysis.abnormal.max():.2f}; threshold {analysis.threshold:.2f}."
    )


def attention_picture(attention: np.ndarray, samples: np.ndarray, sampling_rate: int, top: float, span: Span) -> str:
    """Draw where the model's last layer read, over the spectrogram of one span.

    Args:
        attention: (frequency patches, time patches), low frequencies and early times first.
        samples: 16-bit, of the whole recording, (n,).
        sampling_rate: in Hz.
        top: highest frequency to show, in Hz.
        span: that the attention is of.

    Returns:
        HTML of a figure.
    """
    part = samples[int(span.start * sampling_rate) : max(1, int(span.end * sampling_rate))]
    bands = _bands_below(top, sampling_rate)
    share = attention / max(float(attention.max()), 1e-12)
    stretched = Image.fromarray(share.astype(np.float32)).resize((4 * share.shape[1], _BANDS), Image.Resampling.BICUBIC)
    heat = _image(_ramp(np.clip(np.asarray(stretched), 0, 1)[:bands], _HEAT))
    background = _image(_shade(mel_spectrogram(part, sampling_rate, top)))
    layers = f'<img src="{background}" alt=""><img src="{heat}" alt="">'
    heading = "Mel spectrogram, Hz; yellow where the model’s last layer read most"
    lane = _lane(heading, "q-dark", layers, _frequency_ticks(top))
    text = f"Attention over the spectrogram of {span.start:.1f} to {span.end:.1f} seconds."
    return (
        f'<figure class="q-figure"><div role="img" aria-label="{escape(text)}">{lane}'
        f"{_time_axis(span.start, span.end)}</div><figcaption>It shows where the model looked, not why it decided."
        "</figcaption></figure>"
    )


def _lane(heading: str, name: str, content: str, ticks: str = "") -> str:
    return (
        f'<div class="q-heading">{heading}</div><div class="q-ticks">{ticks}</div>'
        f'<div class="q-lane {name}">{content}</div>'
    )


def _mark(span: Span, duration: float, content: str = "") -> str:
    left, width = 100 * span.start / duration, 100 * (span.end - span.start) / duration
    return f'<span class="q-span {_style(span.label)}" style="left:{left:.2f}%;width:{width:.2f}%">{content}</span>'


def _style(label: str) -> str:
    return f"q-{label}" if label in LETTERS else "q-other"


def _letter(label: str) -> str:
    return escape(LETTERS.get(label, label[:1].upper()))


def _outline(picture: Picture) -> str:
    return f'<svg viewBox="0 -1 {picture.columns} 2" preserveAspectRatio="none"><path d="{picture.outline}"/></svg>'


def _curves(analysis: Analysis) -> str:
    """Each class's probability as steps, P(abnormal) filled, and the threshold."""
    edges = 1000 * np.asarray(analysis.edges) / analysis.duration
    lines = [_steps(edges, analysis.abnormal, "q-abnormal")]
    for index, name in enumerate(analysis.classes):
        if index != analysis.normal:
            lines.append(_steps(edges, analysis.probabilities[:, index], _style(name)))
    height = 100 * (1 - analysis.threshold)
    lines.append(f'<path class="q-threshold" d="M0 {height:.1f}H1000"/>')
    return f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none">{"".join(lines)}</svg>'


def _steps(edges: np.ndarray, values: np.ndarray, name: str) -> str:
    """A path that is flat over each of the edges (n, 2) and, where they do not meet, broken."""
    pieces, last = [], None
    for (start, end), value in zip(edges, values, strict=True):
        height = f"{100 * (1 - float(value)):.1f}"
        joined = last is not None and abs(start - last) < 1e-6
        pieces.append(f"V{height}H{end:.1f}" if joined else f"M{start:.1f} {height}H{end:.1f}")
        last = end
    return f'<path class="{name}" d="{"".join(pieces)}"/>'


def _legend(analysis: Analysis) -> str:
    entries = [("q-abnormal", "any abnormal sound (1 − normal)")]
    entries += [
        (_style(name), f"{escape(sounds(name))} ({_letter(name)})")
        for index, name in enumerate(analysis.classes)
        if index != analysis.normal
    ]
    entries.append(("q-threshold", f"threshold {analysis.threshold:.2f}"))
    return "".join(
        f'<span class="q-key"><svg viewBox="0 0 28 10" aria-hidden="true"><path class="{name}" d="M0 5H28"/></svg>'
        f"{text}</span>"
        for name, text in entries
    )


def _frequency_ticks(top: float) -> str:
    shown = [hertz for hertz in (250, 500, 1000, 2000, 4000) if hertz <= top]
    return "".join(_tick(f"{hertz:,}", 100 * (1 - _height(hertz) / _height(top))) for hertz in shown)


def _probability_ticks() -> str:
    return "".join(_tick(name, place) for name, place in (("1", 0), ("0.5", 50), ("0", 100)))


def _tick(name: str, place: float) -> str:
    return f'<span style="top:{place:.1f}%">{name}</span>'


def _time_axis(start: float, end: float) -> str:
    duration = end - start
    step = next((step for step in (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120) if duration / step <= 7), 120)
    times = step * np.arange(np.ceil(start / step - 1e-9), np.floor(end / step + 1e-9) + 1) + 0.0
    ticks = "".join(
        f'<span style="left:{100 * (time - start) / duration:.2f}%">{clock(time, step)}</span>' for time in times
    )
    unit = "min:s" if step >= 20 else "s"
    return f'<div class="q-time">{ticks}</div><div class="q-unit">time, {unit}</div>'


def clock(seconds: float, step: float = 0.1) -> str:
    """Write a time on an axis with marks every `step` seconds: 1.5, or 1:30 where they are 20 s or more apart."""
    if step >= 20:
        return f"{int(seconds + 0.5) // 60}:{int(seconds + 0.5) % 60:02d}"
    return f"{seconds:.{0 if step >= 1 else 2 if step == 0.25 else 1}f}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """An HTML table; all text is escaped."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="q-scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="q-table">'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
