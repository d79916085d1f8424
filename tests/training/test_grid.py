import itertools
import json
import os
import time

import pytest
import torch

from modeling_qlung.training import grid
from modeling_qlung.training.arguments import RECIPES, parse
from modeling_qlung.training.grid import GridRun, expand_rows, free_gpus, row_arguments, run_grid

GRIDS = sorted(path.stem for path in (RECIPES / "grids").glob("*.yaml"))
# A run in miniature: it says what it was given, takes its time, and ends or fails.
SCRIPT = """
import json, os, sys, time
folder, seconds, status = sys.argv[1:]
begin = time.time()
time.sleep(float(seconds))
print("progress 50%|", end="\\r")
names = ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "QLUNG_OTHER")
os.makedirs(folder)
with open(folder + "/metrics.json", "w") as file:
    json.dump({"begin": begin, "end": time.time(), **{name: os.environ.get(name) for name in names}}, file)
print("it broke", file=sys.stderr) if int(status) else None
sys.exit(int(status))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def run_of(tmp_path, name: str, seconds: float = 0.0, status: int = 0) -> GridRun:
    folder = tmp_path / name / "seed_1"
    return GridRun(name, folder, [str(folder), str(seconds), str(status)])


def result(run: GridRun) -> dict:
    return json.loads((run.folder / "metrics.json").read_text())


@pytest.mark.parametrize("name", GRIDS)
def test_every_row_of_every_grid_can_be_run(name):
    rows = expand_rows([name])
    assert len(rows) >= 8
    for row in rows:
        parse(row_arguments(row))


def test_rows_are_recipes_with_changes_and_grids_are_their_rows():
    assert row_arguments("qlung-ast,rho=0.1,sharpness=sam") == ["qlung-ast", "--rho=0.1", "--sharpness=sam"]
    rows = expand_rows(["study-qlung", "study", "quickstart"])
    assert rows[0] == "study-qlung"
    assert rows[-1] == "quickstart"
    assert rows.count("study-qlung") == 1


@pytest.mark.parametrize("row", ["quickstart,rho", "quickstart,=1", "quickstart,rho="])
def test_a_malformed_row_is_refused(row):
    with pytest.raises(SystemExit, match=r"is not option=value\. A row is RECIPE or"):
        row_arguments(row)


def test_runs_on_a_cpu_follow_each_other_in_a_process_of_their_own(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "QLUNG_OTHER"):
        monkeypatch.setenv(name, "1")
    runs = [run_of(tmp_path, name, 0.1) for name in ("one", "two")]
    assert run_grid(script, runs) == []
    first, second = map(result, runs)
    assert first["end"] <= second["begin"]
    assert first["QLUNG_OTHER"] == "1", "the user's own environment stays"
    assert {first[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")} == {None}


def test_each_free_gpu_has_one_run_at_a_time(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(grid, "free_gpus", lambda: ["0", "3"])
    runs = [run_of(tmp_path, str(number), 0.5) for number in range(5)]
    assert run_grid(script, runs) == []
    by_gpu: dict[str, list] = {"0": [], "3": []}
    for run in runs:
        by_gpu[result(run)["CUDA_VISIBLE_DEVICES"]].append((result(run)["begin"], result(run)["end"]))
    assert sorted(map(len, by_gpu.values())) == [2, 3]
    for spans in by_gpu.values():
        spans.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert min(end for _, end in by_gpu["0"]) > by_gpu["3"][0][0], "they run at the same time"


def test_gpus_in_use_are_left_alone(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda index: [(79 * gib, 80 * gib), (40 * gib, 80 * gib)][index % 2]
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,4,5")
    assert free_gpus() == ["1", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert free_gpus() == ["0", "2"]


def test_a_failed_run_is_given_back_with_what_it_said_last(script, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    good, bad = run_of(tmp_path, "good"), run_of(tmp_path, "bad", status=3)
    assert run_grid(script, [bad, good]) == [bad]
    assert result(good)
    assert "bad: FAILED after 0.0 min, it broke" in caplog.text
    assert "good: ended after" in caplog.text


def test_what_runs_is_stopped_with_the_grid(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    begun = time.monotonic()

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_grid(script, [run_of(tmp_path, "long", 60)])
    assert time.monotonic() - begun < 30
    assert not os.path.exists(tmp_path / "long" / "seed_1")
