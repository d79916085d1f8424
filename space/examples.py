"""Three short recordings to try the page with: simulated, no patient's. `python space/examples.py` makes them again."""

from pathlib import Path

FOLDER = Path(__file__).parent / "sounds"
ABOUT = (
    "No recording at hand? Simulated ones show how the page works. The model in the box learned from "
    "real ones alone: what it marks in these means nothing."
)
# name: (file, device, seed, kinds of its cycles); of these seeds noise lies some 20 dB below or more
EXAMPLES: dict[str, tuple[str, int, int, list[str]]] = {
    "Simulated normal breathing": ("simulated_normal.flac", 0, 2, ["Normal"] * 4),
    "Simulated crackles": ("simulated_crackles.flac", 0, 1, ["Normal", "Coarse Crackle", "Normal", "Coarse Crackle"]),
    "Simulated wheezes": ("simulated_wheezes.flac", 0, 3, ["Wheeze", "Normal", "Wheeze", "Normal"]),
}


def paths() -> dict[str, str]:
    """Give the example files by the names that the page shows."""
    return {name: str(FOLDER / file) for name, (file, *_) in EXAMPLES.items()}


def synthesize() -> None:
    """Write the example files, as the dataset of simulated sounds makes its recordings."""
    import soundfile

    from hf_datasets.simulated import DEVICES, draw_plan, render

    FOLDER.mkdir(exist_ok=True)
    for file, device, seed, kinds in EXAMPLES.values():
        plan = draw_plan((seed,), DEVICES[device], kinds)
        soundfile.write(FOLDER / file, sum(render(plan)), plan.device.rate, subtype="PCM_16")


if __name__ == "__main__":
    synthesize()
