"""Small datasets in the layouts that people have on their disks, and a server to download them from."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import numpy as np
import pytest
import soundfile as sf

from hf_datasets import icbhi, sprsound


def write_noise(path: Path, seconds: float, rate: int, subtype: str) -> None:
    """White noise that fills the file's bit depth, different for each file name."""
    rng = np.random.default_rng(list(path.name.encode()))
    sf.write(path, rng.integers(-(2**31), 2**31, round(seconds * rate)).astype(np.int32), rate, subtype)


ICBHI_CYCLES = {
    "101_1b1_Al_sc_Meditron": [(0.036, 0.579, 0, 0), (0.579, 1.2, 1, 0)],
    "102_1b1_Ar_sc_Litt3200": [(0.0, 0.7, 0, 1)],
    "103_2b2_Ar_mc_LittC2SE": [(0.1, 0.9, 1, 1), (0.9, 1.1, 0, 0)],
    "226_1b1_Pl_sc_LittC2SE": [(0.2, 0.8, 1, 0)],
}
ICBHI_FORMATS = {"101": (44100, "PCM_24"), "102": (4000, "PCM_16"), "103": (44100, "PCM_16"), "226": (10000, "PCM_24")}


@pytest.fixture
def small_icbhi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four recordings of 1.2 s, six cycles, one test recording; the split file has the published misnomer."""
    root = tmp_path / "icbhi"
    database = root / "ICBHI_final_database"
    database.mkdir(parents=True)
    for name, cycles in ICBHI_CYCLES.items():
        write_noise(database / f"{name}.wav", 1.2, *ICBHI_FORMATS[name[:3]])
        lines = ("\t".join(map(str, cycle)) for cycle in cycles)
        (database / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (root / "ICBHI_challenge_train_test.txt").write_text(
        "101_1b1_Al_sc_Meditron\ttest\n102_1b1_Ar_sc_Litt3200\ttrain\n"
        "103_2b2_Ar_mc_LittC2SE\ttrain\n226_1b1_Pl_sc_Meditron\ttrain"  # no final newline, as published
    )
    (root / "demographic_info.txt").write_text(
        "\n101 3 F NA 19 99\n102 0.75 M NA 9.8 NA\n103 70 F 33.5 NA NA\n226 NA NA NA NA NA"
    )
    (root / "ICBHI_Challenge_diagnosis.txt").write_text("101\tURTI\n102\tHealthy\n103\tAsthma\n226\tPneumonia\n")
    monkeypatch.setattr(icbhi, "RECORDINGS", {"train": 3, "test": 1})
    monkeypatch.setattr(
        icbhi,
        "CYCLES",
        {
            "train": {"normal": 1, "crackle": 1, "wheeze": 1, "both": 1},
            "test": {"normal": 1, "crackle": 1, "wheeze": 0, "both": 0},
        },
    )
    return root


def break_block_align(path: Path) -> None:
    """Give a WAV file the block align 4 that SPRSound's have."""
    content = bytearray(path.read_bytes())
    content[32:34] = (4).to_bytes(2, "little")
    path.write_bytes(content)


SPRSOUND_FILES: dict[str, dict[str, tuple[str, list[tuple]]]] = {
    "train2022": {
        "401_15.3_0_p1_981": (
            "CAS & DAS",
            [("100", "400", "Normal"), (400, 700, "Wheeze"), ("700", "900", "Wheeze+Crackle")],
        ),
        "402_0.2_1_p4_982": ("CAS", [("0", "500", "Rhonchi"), (500.0, 800, "Stridor"), ("800", "990", "Fine Crackle")]),
        "402_0.2_1_p3_983": ("Poor Quality", []),
    },
    "intra": {"401_15.4_0_p2_984": ("DAS", [("100", "600", "Coarse Crackle")])},
    "inter": {"403_7.0_1_p1_985": ("Normal", [("100", "600", "Normal")])},
}


@pytest.fixture
def small_sprsound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three, one and one recordings of 1 s; six, one and one events; both spellings of the record key."""
    root = tmp_path / "sprsound" / "BioCAS2022"
    for part, files in SPRSOUND_FILES.items():
        audio = root / ("train2022_wav" if part == "train2022" else "test2022_wav")
        annotations = root / ("train2022_json" if part == "train2022" else f"test2022_json/{part}_test_json")
        for folder in (audio, annotations):
            folder.mkdir(parents=True, exist_ok=True)
        for name, (label, events) in files.items():
            write_noise(audio / f"{name}.wav", 1.0, 8000, "PCM_16")
            break_block_align(audio / f"{name}.wav")
            key = "recording_annotation" if part == "inter" else "record_annotation"
            marks = [{"start": start, "end": end, "type": kind} for start, end, kind in events]
            (annotations / f"{name}.json").write_text(json.dumps({key: label, "event_annotation": marks}))
    monkeypatch.setattr(sprsound, "RECORDINGS", {"train": 3, "test_intra": 1, "test_inter": 1})
    monkeypatch.setattr(sprsound, "EVENTS", {"train": 6, "test_intra": 1, "test_inter": 1})
    monkeypatch.setattr(
        sprsound, "EVENTS_BY_TYPE", {"train": (1, 1, 1, 1, 0, 1, 1), "test_intra": (0, 0, 0, 0, 1, 0, 0)}
    )
    return root.parent


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `datasets` try the network, also where HF_HUB_OFFLINE is set."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def serve(network: None) -> Iterator[Callable[[Path], str]]:
    """Serve a folder over HTTP on this machine; returns its address."""
    servers = []

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_SilentHandler, directory=str(folder)))
        servers.append(server)
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class _SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass
