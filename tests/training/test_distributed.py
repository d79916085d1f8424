"""Two processes on CPUs, set up by the configurations that come with the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from transformers import ASTModel

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = ROOT / "modeling_qlung" / "training" / "accelerate"


def launch(configuration: str, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = ["--config_file", str(CONFIGURATIONS / f"{configuration}.yaml"), "--main_process_port", "0"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", "2"]
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["ddp", "fsdp2"])
def test_two_processes_follow_the_documented_rule(tmp_path, configuration):
    """Plain and sharpness-aware training, uneven evaluation, saving and resuming, with gloo."""
    done = launch(configuration, "tests/training/distributed_worker.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("every check passed") == 2


@pytest.mark.parametrize(
    ("name", "engine", "machines"),
    [
        ("ddp", DistributedType.MULTI_GPU, 1),
        ("fsdp2", DistributedType.FSDP, 1),
        ("deepspeed_zero2", DistributedType.DEEPSPEED, 1),
        ("multi_node", DistributedType.MULTI_GPU, 2),
    ],
)
def test_configurations_are_read_by_accelerate(name, engine, machines):
    """Its parser refuses keys that it does not know."""
    configuration = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    assert configuration.distributed_type == engine
    assert configuration.num_machines == machines
    assert configuration.num_processes >= 2 * machines
    assert configuration.mixed_precision == "no", "the launcher's precision would override the recipe's"


def test_every_configuration_is_known():
    assert {path.stem for path in CONFIGURATIONS.iterdir()} == {"ddp", "fsdp2", "deepspeed_zero2", "multi_node"}


def test_fsdp2_shards_the_layers_that_the_encoder_has():
    options = load_config_from_file(str(CONFIGURATIONS / "fsdp2.yaml")).fsdp_config
    assert options["fsdp_version"] == 2
    assert options["fsdp_transformer_layer_cls_to_wrap"] in ASTModel._no_split_modules
