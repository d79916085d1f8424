import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def torchrun(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)


@pytest.mark.slow
def test_two_processes_follow_the_documented_rule(tmp_path):
    """Plain and sharpness-aware training, uneven evaluation and resuming, under DDP with gloo."""
    done = torchrun("tests/training/distributed_worker.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("every check passed") == 2
