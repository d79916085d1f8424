"""The metric as a page: predicted and true classes in, the scores out.

`evaluate` has a widget of its own, which asks for parts that Gradio dropped in its version 4.
"""

from pathlib import Path
from typing import Any

import evaluate
import gradio as gr

CLASSES = ("normal", "crackle", "wheeze", "both")

metric = evaluate.load(str(Path(__file__).with_name("icbhi_score.py")))


def score(predictions: str, references: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Score classes given as numbers or names between commas, blanks or lines; gives the five scores, and the rest.

    Raises:
        gr.Error: in the page, for anything that is no class, and what the metric refuses.
    """
    try:
        result = metric.compute(predictions=_read(predictions), references=_read(references))
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    details = {name: result.pop(name) for name in ("recall", "support", "confusion_matrix")}
    return result, details


def _read(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    known = {name: number for number, name in enumerate(CLASSES)} | {str(n): n for n in range(len(CLASSES))}
    if unknown := sorted(set(words) - known.keys()):
        raise ValueError(f"{unknown[0]!r} is no class: give {', '.join(CLASSES)}, or 0 to 3")
    return [known[word] for word in words]


demo = gr.Interface(
    score,
    [gr.Textbox(label="Predicted classes", lines=3), gr.Textbox(label="True classes, in the same order", lines=3)],
    [gr.JSON(label="In percent"), gr.JSON(label="By class; confusion matrix, rows the truth")],
    title="ICBHI score",
    description="Classes of respiratory cycles: normal, crackle, wheeze, both, or 0 to 3.",
    examples=[["normal normal crackle both", "normal crackle crackle wheeze"]],
    cache_examples=False,
    flagging_mode="never",
    api_name="score",
)

if __name__ == "__main__":
    demo.launch()
