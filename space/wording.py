"""What the page says in words: the verdict, the operating point, quality, and the sounds' names."""

from collections.abc import Sequence

from modeling_qlung.inference import Analysis, OperatingPoints

NOT_A_DEVICE = (
    "Not a medical device. A small research model marks what resembles crackles and wheezes; it misses some and marks "
    "other sounds. Do not use it to diagnose, to triage or to reassure."
)
_ADVICE = {
    "too quiet": "with the microphone on and held to the skin",
    "clipped": "at a lower level",
    "mains hum": "away from mains cables",
    "handling noise": "without moving the stethoscope",
}
_GROUPS = {
    "sprsound:test_intra": "SPRSound’s intra-subject test",
    "sprsound:test_inter": "SPRSound’s inter-subject test",
    "icbhi:test": "ICBHI’s test",
}
_SOUNDS = {"crackle": "crackles", "wheeze": "wheezes", "both": "crackles with wheezes"}


def sounds(label: str) -> str:
    """Name a class of the model in the plural: `both` is "crackles with wheezes"."""
    return _SOUNDS.get(label, label)


def verdict(analysis: Analysis) -> str:
    """Say in one sentence what was heard, or that nothing can be said; of annotated cycles, in how many."""
    if not analysis.can_tell:
        return f"I can’t tell: the recording is too poor, or unlike those I know{_because(analysis.reasons)}."
    total = _count(len(analysis.edges), "annotated cycle") if analysis.cycles else f"{analysis.duration:.1f} s"
    marked = _marked(analysis)
    if not marked:
        return f"Nothing abnormal was marked in {total}."
    names = sorted(marked, key=analysis.classes.index)
    first, *others = [f"{sounds(name)}{{}} in {marked[name]}" for name in names]
    sentence = "; ".join([first.format(" were marked"), *(other.format("") for other in others)])
    return f"{sentence.capitalize()} of {total}." if not others else f"{sentence.capitalize()}; of {total} in all."


def _marked(analysis: Analysis) -> dict[str, str]:
    """Say of each class that was marked in how many places and for how long, or in how many cycles."""
    found: dict[str, list[float]] = {}
    for span in analysis.spans:
        found.setdefault(span.label, []).append(span.end - span.start)
    if analysis.cycles:
        return {label: f"{len(lengths):,}" for label, lengths in found.items()}
    return {label: f"{_count(len(lengths), 'place')}, {sum(lengths):.1f} s" for label, lengths in found.items()}


def caution(analysis: Analysis) -> str:
    """Say what the verdict does not mean."""
    if not analysis.can_tell:
        advice = next((_ADVICE[reason] for reason in analysis.reasons if reason in _ADVICE), "in a quiet room")
        if not analysis.spans:
            return f"That nothing is marked says nothing: record again, {advice}."
        return f"What the model marked is drawn below all the same. Do not rely on it: record again, {advice}."
    if not analysis.spans:
        return "This does not mean that the lungs are healthy: sounds may be missed, or absent where it was recorded."
    return "Listen to each place before you believe it."


def operating_point(points: OperatingPoints | None, threshold: float) -> str:
    """Say what a threshold of P(abnormal) did on the model's validation patients, with their number."""
    if points is None:
        return "The model’s checkpoint does not say how often it was right at this value."
    rates = points.at(threshold)
    by_recording, by_cycle = rates["recordings"], rates["cycles"]
    return (
        f"At {threshold:.2f}, on {_count(points.patients, 'validation patient')}: of "
        f"{_count(points.recordings['abnormal'], 'recording')} with an abnormal sound "
        f"{_percent(by_recording['sensitivity'])} were marked somewhere (sensitivity), and of "
        f"{points.recordings['normal']:,} without one {_percent(by_recording['specificity'])} were left unmarked "
        f"(specificity). By annotated cycle or event, each as a whole: sensitivity "
        f"{_percent(by_cycle['sensitivity'])} of {points.cycles['abnormal']:,}, specificity "
        f"{_percent(by_cycle['specificity'])} of {points.cycles['normal']:,}."
    )


def evidence(points: OperatingPoints) -> str:
    """Say how well the model told abnormal from normal recordings of each group it was measured on, if of any."""
    told = [
        f"{_percent(part['recordings']['AUROC'][0])} of {_GROUPS.get(part['of'], part['of'])}"
        for part in points.scores
        if part["recordings"]["AUROC"][0] is not None
    ]
    if not told:
        return ""
    return (
        "It ranked a recording with an abnormal sound above one without (AUROC; a coin has 50 %, less is no use) in: "
        f"{', '.join(told)}. On people and stethoscopes unlike these, expect no better."
    )


def quality(analysis: Analysis) -> str:
    """Say how good the recording is, and why it is not better."""
    if analysis.quality is None:
        said = "This model does not judge recordings’ quality"
    else:
        said = f"Recording quality {analysis.quality:.2f} of 1"
    if not analysis.reasons:
        return f"{said}." if analysis.can_tell or analysis.quality is None else f"{said}; no single cause stands out."
    return f"{said}{'. Noticed' if analysis.can_tell else ''}: {', '.join(analysis.reasons)}."


def _because(reasons: Sequence[str]) -> str:
    return f" ({', '.join(reasons)})" if reasons else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
