import math

import pytest

from tests.benchmarks.training import (
    PATCH_MIX,
    Configuration,
    Measurement,
    Setting,
    apart,
    open_rows,
    print_results,
    simulate_rows,
    step_flops,
    train_steps,
)

TINY = Setting(
    (
        "--duration=0.5",
        "--hidden_size=16",
        "--num_hidden_layers=1",
        "--num_attention_heads=2",
        "--intermediate_size=32",
    ),
    rows=16,
    warmup=1,
    block=2,
    seconds=0.05,
)


def test_a_row_is_measured(tmp_path):
    rows = simulate_rows(TINY.rows, str(tmp_path))
    assert len(open_rows(rows)) == 16
    measured = train_steps(Configuration("", 4, profiled=True), TINY, rows)
    assert measured.clips_per_second > 0
    assert 0 < measured.loader_share < 1
    assert measured.first_batch > 0
    assert sum(measured.profile.values()) == pytest.approx(1)
    assert measured.profile["matrix products"] > 0


def test_operations_are_those_of_the_formula():
    """Backward takes two products for each one forward; of the patches, whose input needs no gradient, one."""
    patches, width, layers = 12 * 79, 768, 12
    tokens = patches + 2
    embedding = 2 * patches * 16 * 16 * width
    linear = 2 * tokens * width * (4 * width + 2 * 4 * width)
    attention = 2 * 2 * tokens * tokens * width
    head = 2 * width * 4
    assert step_flops(Setting()) == 3 * (layers * (linear + attention) + head) + 2 * embedding


def test_the_table_gives_ratios(capsys):
    results = {
        Configuration("ours", 32): Measurement(600.0, 0.01, 0.2, 2**31, {"attention": 0.25}),
        Configuration(PATCH_MIX, 8, None): Measurement(150.0, 0.02, 0.3, 2**30),
        Configuration("another", 8): Measurement(error="out of memory"),
    }
    results[Configuration("ours", 32)].profile = dict.fromkeys(
        ("attention", "convolution", "matrix products", "optimiser", "copies", "else", "idle"), 1 / 7
    )
    print_results(results, flops=10**9, rate=1e12)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == f"| {PATCH_MIX} | 8 | 150 | 1.00 | 15.0% | 2.0% | 0.30 s | 1.0 GiB |"
    assert lines[3] == "| ours | 32 | 600 | 4.00 | 60.0% | 1.0% | 0.20 s | 2.0 GiB |"
    assert "| ours, 32 | 14.3% |" in "\n".join(lines)
    assert lines[-1] == "another, batch 8: out of memory"


@pytest.mark.slow
def test_a_process_apart_gives_its_result_or_its_error():
    assert apart(math.sqrt, 4.0, seconds=60) == 2.0
    with pytest.raises(RuntimeError, match="ValueError: math domain error"):
        apart(math.sqrt, -1.0, seconds=60)
