"""The tables of `python -m modeling_qlung.evaluation.quality`, in Markdown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .report import format_interval, format_mean_sd

Results = Mapping[str, Any]


def to_markdown(results: Results) -> str:
    """Format what `quality.evaluate` gives as Markdown, a section for each experiment in it."""
    sections: dict[str, tuple[str, Callable[[Results], list[str]]]] = {
        "label": ("Poor recordings told from usable ones, children not seen in fitting", _label),
        "label_test_intra": ("The same in the intra-subject test, of children not seen in fitting either", _label),
        "label_test_inter": ("The same in the inter-subject test, of other children", _label),
        "noise": ("Mean score of good recordings as they get worse", _noise),
        "half": ("Noise in the second half alone: mean score, and share that scores 0.5 and more", _half),
        "alone": ("Noise alone, without a recording", _alone),
        "simulated": ("Simulated recordings: rank correlation of score and signal-to-noise ratio", _simulated),
        "invariance": ("What should not matter: change of the score", _invariance),
        "findings": ("Among good recordings: AUROC of normal above abnormal; 0.5 is blind to it", _findings),
        "removal": ("Good recordings without their findings, or without as much else: change of the score", _removal),
        "reasons": ("Reasons given: share of recordings", _reasons),
        "faults": ("Faults given to good recordings: how often they are named", _faults),
        "devices": ("ICBHI's stethoscopes", _devices),
    }
    present = [(title, lines(results[name])) for name, (title, lines) in sections.items() if name in results]
    return "\n\n".join(f"## {title}\n\n" + "\n".join(lines) for title, lines in present)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _number(value: float | None, spec: str = ".3f") -> str:
    return "–" if value is None else f"{value:{spec}}".replace("-", "−")


def _percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _label(results: Results) -> list[str]:
    names = {"auroc_within": "AUROC within folds", "auroc": "AUROC of all", "average_precision": "average precision"}
    names = {key: title for key, title in names.items() if key in next(iter(results.values()))}
    head = ["score", *(part for title in names.values() for part in (title, "95 %"))]
    head += ["Brier", "Brier of a constant", "ECE"]
    rows = []
    for name, found in results.items():
        cells = [
            text
            for measure in (found[key] for key in names)
            for text in (format_mean_sd(measure["mean"], measure["sd"], ".3f"), format_interval(measure["interval"]))
        ]
        given = found.get("calibration", {})
        rows.append([f"`{name}`", *cells, *(_number(given.get(key)) for key in ("brier", "brier_constant", "ece"))])
    about = next(iter(results.values()))
    counts = f"{about['poor']} poor recordings of {about['n']:,}, {about['patients']} children"
    gates = [
        [f"`{name}`, {gate}", _number(g["threshold"]), _percent(g["poor"], 1), _percent(g["usable"], 1)]
        for name, found in results.items()
        for gate, g in found["gates"].items()
    ]
    refused = _table(["gate", "threshold", "poor recordings refused", "usable ones refused"], gates)
    drawn = "; mean ± sd over folds drawn anew" if "auroc_within" in names else ""
    return [*_table(head, rows), "", f"{counts}{drawn}.", "", *refused]


def _noise(results: Results) -> list[str]:
    lines: list[str] = []
    for name, kinds in results.items():
        groups: dict[str, dict[str, Any]] = {}
        for kind, found in kinds.items():
            what = {"dB": "signal-to-noise ratio", "%": "share of samples lost"}[found["unit"]]
            groups.setdefault(f"{what}, never fitted to" if found["unseen"] else what, {})[kind] = found
        for what, own in groups.items():
            first = next(iter(own.values()))
            unit = first["unit"]
            levels = [f"{level:g} {unit}".replace("-", "−") for level in first["levels"]]
            head = [f"`{name}`, by {what}", "as recorded", *levels, "Spearman", "monotone"]
            rows = [
                [
                    kind,
                    *(_number(mean, ".2f") for mean in f["mean"]),
                    _number(f["spearman"], ".2f"),
                    _percent(f["monotone"]),
                ]
                for kind, f in own.items()
            ]
            lines += [*_table(head, rows), ""]
    return [
        *lines,
        "Spearman: rank correlation of score and level, −1 where it falls throughout, mean over recordings. Monotone: "
        "recordings whose score nowhere rises by more than 0.01.",
    ]


def _half(results: Results) -> list[str]:
    lines: list[str] = []
    for name, kinds in results.items():
        levels = [f"{level:g} dB".replace("-", "−") for level in next(iter(kinds.values()))["levels"]]
        rows = [
            [kind, *(f"{_number(m, '.2f')}, {_percent(p)}" for m, p in zip(f["mean"], f["passing"], strict=True))]
            for kind, f in kinds.items()
        ]
        lines += [*_table([f"`{name}`", "as recorded", *levels], rows), ""]
    return lines[:-1]


def _alone(results: Results) -> list[str]:
    head = ["", *(f"`{name}`, {what}" for name in results for what in ("mean", "0.5 and more"))]
    rows = []
    for kind in next(iter(results.values())):
        of_scores = [found[kind] for found in results.values()]
        rows.append([kind, *(c for f in of_scores for c in (_number(f["mean"], ".2f"), _percent(f["passing"])))])
    return _table(head, rows)


def _simulated(results: Results) -> list[str]:
    devices = list(next(iter(results.values()))["by_device"])
    rows = [
        [f"`{name}`", _number(found["spearman"], ".2f"), *(_number(found["by_device"][d], ".2f") for d in devices)]
        for name, found in results.items()
    ]
    return _table(["score", "all", *devices], rows)


def _invariance(results: Results) -> list[str]:
    lines: list[str] = []
    for name, changes in results.items():
        head = [f"`{name}`", "recordings", "mean", "95th percentile", "rank correlation", "called otherwise"]
        rows = []
        for kind, found in changes.items():
            moved = [_number(found[key]) for key in ("mean", "p95", "spearman")]
            signed = [_number(found[key], "+.3f") for key in ("usable", "poor")]
            told = [_number(found[key], ".2f") for key in ("auroc_before", "auroc_after")]
            rows.append([kind.replace("-", "−"), str(found["n"]), *moved, _percent(found["crossing"]), *signed, *told])
        lines += [*_table([*head, "up or down: usable", "poor", "AUROC before", "after"], rows), ""]
    return [
        *lines,
        "Mean, 95th percentile: of the absolute change. Called otherwise: on the other side of the best balance. Up or "
        "down: mean change of usable and of poor recordings. AUROC: how well the poor ones are told.",
    ]


def _findings(results: Results) -> list[str]:
    rows = []
    for unit, classes in next(iter(results.values())).items():
        for label, about in classes.items():
            found = [scores[unit][label] for scores in results.values()]
            cells = [f"{_number(f['auroc'], '.2f')} {format_interval(f['interval'])}" for f in found]
            rows.append([f"{label}, {unit}", str(about["n"]), str(about["patients"]), *cells])
    return _table(["", "n", "children", *(f"`{name}`" for name in results)], rows)


def _removal(results: Results) -> list[str]:
    counted, moved = ["recordings", "children", "left out"], ["change", "instead", "difference", "95 %"]
    rows = []
    for name, findings in results.items():
        for finding, control, found in ((f, c, found) for f, of in findings.items() for c, found in of.items()):
            counts = [str(found[key]) for key in ("n", "patients", "left_out")]
            changes = [_number(found[key], "+.3f") for key in ("removed", "control", "difference")]
            ends = ", ".join(_number(end, "+.3f") for end in found["interval"] or ())
            rows.append([f"`{name}`", finding, control, *counts, *changes, f"[{ends}]" if ends else "–"])
    return _table(["", "cut out", "or instead", *counted, *moved], rows)


def _reasons(results: Results) -> list[str]:
    head = ["", *(f"{name} ({about['n']})" for name, about in results.items())]
    rows = [["any", *(_percent(about["any"]) for about in results.values())]]
    names = next(iter(results.values()))["reasons"]
    rows += [[name, *(_percent(about["reasons"][name]) for about in results.values())] for name in names]
    return _table(head, rows)


def _faults(results: Results) -> list[str]:
    lines: list[str] = []
    for unit in dict.fromkeys(found["unit"] for found in results.values()):
        own = {reason: found for reason, found in results.items() if found["unit"] == unit}
        levels = [f"{level:g} {unit}".replace("-", "−") for level in next(iter(own.values()))["levels"]]
        rows = [[reason, *(_percent(share) for share in found["named"])] for reason, found in own.items()]
        lines += [*_table(["", *levels], rows), ""]
    return lines[:-1]


def _devices(results: Results) -> list[str]:
    head = ["", "device", "n", "patients", "mean ± sd", "5 % – 50 % – 95 %", "below 0.5"]
    head += ["variance between devices", "95 %"]
    rows = []
    for name, units in results.items():
        for unit, found in units.items():
            shared = [_percent(found["share"]), format_interval(found["interval"])]
            for device, d in found["devices"].items():
                range_ = " – ".join(_number(d[key], ".2f") for key in ("p5", "median", "p95"))
                mean = format_mean_sd(d["mean"], d["sd"])
                counts, below = [str(d["n"]), str(d["patients"])], _percent(d["below_half"])
                rows.append([f"`{name}`, {unit}", device, *counts, mean, range_, below, *shared])
                shared = ["", ""]
    return _table(head, rows)
