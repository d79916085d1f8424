import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from modeling_qlung.training import grid
from modeling_qlung.training.arguments import RECIPES, parse
from modeling_qlung.training.grid import GridRun, expand_rows, free_gpus, launcher_variables, row_arguments, run_grid

GRIDS = sorted(path.stem for path in (RECIPES / "grids").glob("*.yaml"))
LIMIT = 60  # seconds after which what never comes is given up
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
# Runs that wait for each other: each marks its GPU, which no other may have, and goes on once the other has begun.
PAIRED = """
import os, sys, time
here, other, limit = sys.argv[1:]
gpu = os.environ["CUDA_VISIBLE_DEVICES"]
os.close(os.open(f"busy-{gpu}", os.O_CREAT | os.O_EXCL))
with open(here + ".part", "w") as file:
    file.write(gpu)
os.replace(here + ".part", here)
deadline = time.monotonic() + float(limit)
while not os.path.exists(other):
    if time.monotonic() > deadline:
        sys.exit(f"{other} never began")
    time.sleep(0.01)
os.remove(f"busy-{gpu}")
"""
# A run that tells when it has begun and ends when it is told to.
PATIENT = """
import os, sys, time
begun, told, limit = sys.argv[1:]
open(begun, "w").close()
deadline = time.monotonic() + float(limit)
while not os.path.exists(told) and time.monotonic() < deadline:
    time.sleep(0.01)
"""
NVIDIA_SMI = """#!/bin/sh
echo asked >> "{log}"
[ "$*" = "--query-gpu=index,uuid,memory.used,memory.total --format=csv,noheader,nounits" ] || exit 2
cat <<END
{answer}
END
"""
GPUS = "0, GPU-aa00, 512, 81559\n1, GPU-bb11, 40960, 81559\n2, GPU-cc22, [N/A], [N/A]\n3, GPU-dd33, 0, 81559"


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Let nvidia-smi give an answer; gives a function that sets it, and that tells how often it was asked."""
    folder, log = tmp_path / "bin", tmp_path / "asked"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def answer(text: str) -> Callable[[], int]:
        (folder / "nvidia-smi").write_text(NVIDIA_SMI.format(log=log, answer=text))
        (folder / "nvidia-smi").chmod(0o755)
        return lambda: len(log.read_text().splitlines()) if log.is_file() else 0

    return answer


def run_of(tmp_path, name: str, seconds: float = 0.0, status: int = 0) -> GridRun:
    folder = tmp_path / name / "seed_1"
    return GridRun(name, folder, [str(folder), str(seconds), str(status)])


def result(run: GridRun) -> dict:
    return json.loads((run.folder / "metrics.json").read_text())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", GRIDS)
def test_every_row_of_every_grid_can_be_run(name):
    rows = expand_rows([name])
    assert len(rows) >= 8
    for row in rows:
        parse(row.arguments)
    assert rows[0].reference == rows[0].name


def test_rows_are_recipes_with_changes():
    assert row_arguments("qlung-ast,rho=0.1,sharpness=sam") == ["qlung-ast", "--rho=0.1", "--sharpness=sam"]
    (row,) = expand_rows(["qlung-ast,rho=0.1"])
    assert row == grid.GridRow("qlung-ast,rho=0.1", ["qlung-ast", "--rho=0.1"], "qlung-ast,rho=0.1")


def test_a_grid_is_its_rows_each_once_and_in_order():
    rows = expand_rows(["study-qlung", "study", "quickstart"])
    names = [row.name for row in rows]
    assert names[0] == "study-qlung"
    assert names[-1] == "quickstart"
    assert names.count("study-qlung") == 1


def test_each_row_has_its_reference():
    """Its own, the first of its grid, or the first of all; --baseline stands for the last two."""
    words = ["quickstart", "study", "quickstart,scale=50"]
    references = {row.name: row.reference for row in expand_rows(words)}
    assert references["quickstart"] == references["quickstart,scale=50"] == "quickstart"
    assert references["study-ce"] == references["study-angular"] == references["study-qlung"] == "study-ce"
    assert references["study-qlung-sam"] == "study-qlung,num_train_epochs=8"
    assert references["study-qlung,num_train_epochs=8"] == "study-qlung"
    assert references["study-qlung,quality_control=constant"] == "study-qlung"
    given = {row.name: row.reference for row in expand_rows(words, "study-angular")}
    named = {name for name in given if given[name] != "study-angular"}
    assert named == {name for name in given if name.startswith("study-qlung") and name != "study-qlung"}
    assert all(given[name] == references[name] for name in named)


def test_a_row_of_a_file_is_named_after_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("dataset: simulated\n")
    path = str(tmp_path / "mine.yaml")
    rows = expand_rows(["quickstart", f"{path},rho=0.1", "qlung-ast,encoder=/some/where/ast"], f"{path},rho=0.1")
    assert [row.name for row in rows] == ["quickstart", "mine,rho=0.1", "qlung-ast,encoder=ast"]
    assert rows[1].arguments == [path, "--rho=0.1"]
    assert {row.reference for row in rows} == {"mine,rho=0.1"}
    with pytest.raises(SystemExit, match=r"other/mine\.yaml would both be the row mine: rename one of the files"):
        expand_rows([path, str(tmp_path / "other" / "mine.yaml")])


def test_a_reference_that_is_no_row_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="--baseline ce is none of the rows quickstart, qlung-ast"):
        expand_rows(["quickstart", "qlung-ast"], "ce")
    (tmp_path / "grids").mkdir()
    (tmp_path / "grids" / "small.yaml").write_text("- quickstart\n- qlung-ast: ast-ce\n")
    monkeypatch.setattr(grid, "RECIPES", tmp_path)
    with pytest.raises(SystemExit, match="qlung-ast: its reference ast-ce is none of the rows quickstart, qlung-ast"):
        expand_rows(["small"])


@pytest.mark.parametrize("row", ["quickstart,rho", "quickstart,=1", "quickstart,rho=", "/my,runs/mine.yaml"])
def test_a_malformed_row_is_refused(row):
    with pytest.raises(SystemExit, match=r"is not option=value\. A row is RECIPE or .* may hold a comma"):
        expand_rows([row])


def test_runs_on_a_cpu_follow_each_other_in_a_process_of_their_own(script, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "QLUNG_OTHER"):
        monkeypatch.setenv(name, "1")
    runs = [run_of(tmp_path, name, 0.1) for name in ("one", "two")]
    assert run_grid(script, runs, use_gpus=False) == []
    first, second = map(result, runs)
    assert first["end"] <= second["begin"]
    assert first["QLUNG_OTHER"] == "1", "the user's own environment stays"
    assert {first[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")} == {None}


@pytest.mark.parametrize(
    ("environ", "kept"),
    [
        ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS"}),  # nobody launched: the user's
        ({"OMP_NUM_THREADS": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}, {"OMP_NUM_THREADS"}),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, set()),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"}, set()),
        ({"LOCAL_DATA": "x", "RANKING": "y", "MASTER_PORT": "29500", "WORLD_SIZE": "2"}, {"LOCAL_DATA", "RANKING"}),
    ],
)
def test_what_launchers_set_is_told_from_the_users_own(environ, kept, caplog):
    assert environ.keys() - launcher_variables(environ) == kept
    assert not caplog.text


def test_a_launchers_precision_is_not_lost_silently(caplog):
    assert launcher_variables({"ACCELERATE_MIXED_PRECISION": "bf16"}) == {"ACCELERATE_MIXED_PRECISION"}
    assert "--mixed_precision bf16 is not passed on: a grid's runs take theirs from --bf16 or --fp16" in caplog.text


def test_each_free_gpu_has_one_run_at_a_time(tmp_path, monkeypatch, nvidia_smi):
    asked = nvidia_smi(GPUS.replace("[N/A], [N/A]", "81000, 81559"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paired.py").write_text(PAIRED)
    pairs = [("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")]
    runs = [GridRun(here, tmp_path / here / "seed_1", [f"{here}.txt", f"{other}.txt", "60"]) for here, other in pairs]
    assert run_grid(str(tmp_path / "paired.py"), runs, use_gpus=True) == []
    used = {here: (tmp_path / f"{here}.txt").read_text() for here, _ in pairs}
    assert {used["a"], used["b"]} == {used["c"], used["d"]} == {"GPU-aa00", "GPU-dd33"}
    assert asked() == 1


def test_gpus_in_use_are_left_alone(monkeypatch, nvidia_smi):
    nvidia_smi(GPUS)
    assert free_gpus() == ["GPU-aa00", "GPU-cc22", "GPU-dd33"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert free_gpus() == ["3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb, GPU-dd33,MIG-0123")
    assert free_gpus() == ["GPU-dd33", "MIG-0123"]


def test_gpus_are_asked_for_only_where_they_are_used(script, tmp_path, nvidia_smi):
    asked = nvidia_smi("0, GPU-aa00, 81000, 81559")
    runs = [run_of(tmp_path, "one")]
    assert run_grid(script, [], use_gpus=True) == run_grid(script, runs, use_gpus=False) == []
    assert asked() == 0
    with pytest.raises(SystemExit, match="Every GPU is in use: wait"):
        run_grid(script, runs, use_gpus=True)


def test_an_nvidia_smi_that_fails_is_named(tmp_path, monkeypatch, nvidia_smi):
    nvidia_smi("")
    monkeypatch.setattr(grid, "GPU_QUERY", ("nvidia-smi", "--help"))
    with pytest.raises(SystemExit, match=r"nvidia-smi does not say which GPUs are free: .*status 2"):
        free_gpus()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"nvidia-smi does not say which GPUs are free: .*No such file"):
        free_gpus()


def test_a_failed_run_is_given_back_with_what_it_said_last(script, tmp_path, caplog):
    good, bad = run_of(tmp_path, "good"), run_of(tmp_path, "bad", status=3)
    assert run_grid(script, [bad, good], use_gpus=False) == [bad]
    assert result(good)
    assert "bad: FAILED after 0.0 min, it broke" in caplog.text
    assert "good: ended after" in caplog.text


def test_what_runs_is_stopped_with_the_grid(script, tmp_path, monkeypatch):
    begun = time.monotonic()

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_grid(script, [run_of(tmp_path, "long", 60)], use_gpus=False)
    assert time.monotonic() - begun < 30
    assert not os.path.exists(tmp_path / "long" / "seed_1")


def test_sigterm_ends_grid_and_runs_and_is_the_callers_again_after(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n"
    )
    reached: list[int] = []

    def mine(number, frame):
        reached.append(number)

    before = signal.signal(signal.SIGTERM, mine)
    try:
        begun = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            run_grid(str(tmp_path / "script.py"), [run_of(tmp_path, "one")], use_gpus=False)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (ended.value.code, reached) == (143, [])
    assert time.monotonic() - begun < 30


def test_a_grid_runs_outside_the_main_thread(script, tmp_path):
    failed: list = ["nothing came back"]
    before = signal.getsignal(signal.SIGTERM)
    run = run_of(tmp_path, "one")
    thread = threading.Thread(target=lambda: failed.__setitem__(slice(None), run_grid(script, [run], use_gpus=False)))
    thread.start()
    thread.join(LIMIT)
    assert failed == []
    assert result(run)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_outlives_its_killed_grid_is_not_made_twice(tmp_path, caplog):
    fcntl = pytest.importorskip("fcntl")
    script, begun, told = tmp_path / "patient.py", tmp_path / "begun", tmp_path / "told"
    script.write_text(PATIENT)
    run = GridRun("orphan", tmp_path / "orphan" / "seed_1", [str(begun), str(told), str(LIMIT)])
    parent = multiprocessing.get_context("fork").Process(target=run_grid, args=(str(script), [run], False))
    parent.start()
    wait_for(begun.exists)
    parent.kill()
    parent.join()
    begun.unlink()
    with caplog.at_level(logging.WARNING):
        assert run_grid(str(script), [run], use_gpus=False) == [run]
    assert "orphan: is being made by another process" in caplog.text
    assert not begun.exists(), "it was not started"
    told.touch()

    def is_free() -> bool:
        with open(run.log) as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    wait_for(is_free)
    assert run_grid(str(script), [run], use_gpus=False) == []
    assert begun.exists()
