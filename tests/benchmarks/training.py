"""Training steps of AST base at 8 s: clips per second against Patch-Mix's training step and the machine's matrix rate.

    python -m tests.benchmarks.training [--patch_mix FOLDER] [--minutes 9]

FOLDER is a copy of `raymin0223/patch-mix_contrastive_learning` (MIT); it also needs torchvision and timm 0.4.5. Each
row is trained in a process of its own, by `QLungTrainer` as `train.py` builds it. Without a GPU the encoder is small,
and the numbers only show that everything runs.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value, disable_progress_bars
from torch._subclasses import FakeTensorMode
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, TrainerCallback

from modeling_qlung.evaluation.tasks import FOUR_CLASS
from modeling_qlung.training.arguments import Arguments, parse
from modeling_qlung.training.build import build_model, build_trainer, fit_extractor
from modeling_qlung.training.data import DECODED_FEATURES

from . import patch_mix
from .timing import machine, matmul_rate, print_table, synchronize

# What a GPU's kernels (a CPU's operators) are called, the first that fits.
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "convolution": ("conv", "wgrad", "dgrad", "im2col"),
    "matrix products": ("gemm", "nvjet", "cutlass", "addmm", "aten::mm", "aten::bmm"),
    "optimiser": ("adam", "multi_tensor", "foreach"),
    "copies": ("memcpy", "memset", "aten::copy_"),
}


@dataclass(frozen=True)
class Setting:
    """How long each row is measured, and on what.

    Args:
        encoder: options of `train.py` for an encoder from scratch.
        rows: size of the data set.
        warmup: steps that do not count.
        block: steps between two looks at the clock.
        seconds: until no further block is begun.
        small: whether the reference takes its smallest encoder.
    """

    encoder: tuple[str, ...] = ("--duration=8.0",)
    rows: int = 2048
    warmup: int = 5
    block: int = 10
    seconds: float = 8.0
    small: bool = False


@dataclass(frozen=True)
class Configuration:
    """A row of the table: what is switched on, and what is asked of `train.py` for it.

    Args:
        name: of the row.
        batch_size: clips per step.
        options: of `train.py`; None for the reference.
        autocast: the reference's own mixed precision (float16).
        attention: kernel that scaled dot-product attention is restricted to, in torch's name; torch's choice if None.
        profiled: whether a few further steps are taken apart.
        needs: seconds, without which it is not begun.
    """

    name: str
    batch_size: int
    options: tuple[str, ...] | None = ()
    autocast: bool = True
    attention: str | None = None
    profiled: bool = False
    needs: float = 40.0


@dataclass
class Measurement:
    """What one row gave."""

    clips_per_second: float = float("nan")
    loader_share: float = float("nan")
    first_batch: float = float("nan")  # seconds
    memory: int = 0  # bytes
    profile: dict[str, float] = field(default_factory=dict)
    error: str | None = None


BF16, COMPILED = ("--bf16=true",), ("--bf16=true", "--torch_compile=true")
PATCH_MIX = "Patch-Mix, float16 autocast"
# In the order of how much each is wanted, in case that time runs out.
ON_GPU = (
    Configuration(PATCH_MIX, 8, None),
    Configuration("bf16, sdpa, fused AdamW, torch.compile", 32, COMPILED, profiled=True, needs=100),
    Configuration("bf16, sdpa, fused AdamW", 32, BF16, profiled=True),
    Configuration("bf16, sdpa, fused AdamW", 8, BF16),
    Configuration("bf16, sdpa, fused AdamW, torch.compile", 128, COMPILED, profiled=True, needs=100),
    Configuration("bf16, sdpa, fused AdamW, torch.compile", 8, COMPILED, needs=100),
    Configuration("TF32, sdpa, AdamW", 8, ("--tf32=true", "--optim=adamw_torch")),
    Configuration("bf16, sdpa, AdamW", 8, (*BF16, "--optim=adamw_torch")),
    Configuration("Patch-Mix, float32", 8, None, autocast=False),
    Configuration(PATCH_MIX, 32, None),
    Configuration("bf16, cuDNN attention, fused AdamW", 32, BF16, attention="CUDNN_ATTENTION"),
    Configuration("bf16, sdpa, fused AdamW", 128, BF16),
)
ON_CPU = (
    Configuration(PATCH_MIX, 2, None),
    Configuration("float32, sdpa, fused AdamW", 2, profiled=True),
    Configuration("bf16, eager attention, fused AdamW", 2, (*BF16, "--attention=eager"), profiled=True),
)
SMALL = (
    "--duration=8.0",
    "--hidden_size=192",
    "--num_attention_heads=3",
    "--intermediate_size=768",
)


class Stopwatch:
    """Times steps in blocks, and what of them is spent waiting for batches; synchronises between blocks alone."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.steps = 0
        self.first_batch = float("nan")
        self.waited = 0.0
        self.blocks: list[float] = []
        self._began = 0.0
        self._waited_before = 0.0

    def wait(self, fetch: Callable[[], Any]) -> Any:
        """Fetch a batch."""
        start = time.perf_counter()
        batch = fetch()
        waited = time.perf_counter() - start
        if not self.steps:
            self.first_batch = waited
        self.waited += waited
        return batch

    def step(self) -> bool:
        """Count a step; gives whether there were enough."""
        self.steps += 1
        counted = self.steps - self.setting.warmup
        if counted < 0 or counted % self.setting.block:
            return False
        synchronize()
        now = time.perf_counter()
        if counted == 0:
            self._waited_before = self.waited
        else:
            self.blocks.append(now - self._began)
        self._began = now
        return sum(self.blocks) >= self.setting.seconds

    def measurement(self, batch_size: int) -> Measurement:
        """Give the median rate of the blocks, and the share of all of them that the loader took."""
        return Measurement(
            clips_per_second=batch_size * self.setting.block / float(np.median(self.blocks)),
            loader_share=(self.waited - self._waited_before) / sum(self.blocks),
            first_batch=self.first_batch,
            memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        )


class StopwatchCallback(TrainerCallback):
    """Ends a training when its stopwatch has seen enough, after three more steps under the profiler if asked for."""

    def __init__(self, stopwatch: Stopwatch, profiled: bool):
        self.stopwatch = stopwatch
        self.result: Measurement | None = None
        self._profiler = torch.profiler.profile(acc_events=True) if profiled else None
        self._left, self._began = 3, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if self.result is None:
            if self.stopwatch.step():
                self.result = self.stopwatch.measurement(args.per_device_train_batch_size)
                control.should_training_stop = self._profiler is None
                if self._profiler is not None:
                    self._profiler.start()
                    self._began = time.perf_counter()
            return
        self._left -= 1
        if not self._left:
            synchronize()
            wall = time.perf_counter() - self._began
            self._profiler.stop()
            self.result.profile = shares_by_kind(self._profiler, wall)
            control.should_training_stop = True


def shares_by_kind(profiler: torch.profiler.profile, wall: float) -> dict[str, float]:
    """Give the share of `wall` seconds that each kind of kernel took on the GPU (of operator, on a CPU)."""
    on_gpu = torch.cuda.is_available()
    totals: Counter[str] = Counter()
    for event in profiler.events() or ():
        if on_gpu == (event.device_type == DeviceType.CUDA) and not event.is_user_annotation:
            name = event.name.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "else")
            totals[kind] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    shares = {kind: totals[kind] / 1e6 / wall for kind in [*KINDS, "else"]}
    return {**shares, "idle": 1 - sum(shares.values())}


def simulate_rows(number: int, folder: str) -> str:
    """Write rows of `decode_cycles`' form, noise of 0.5 to 5 s, to an Arrow file; gives its path."""
    rng = np.random.default_rng(0)
    noise = (0.1 * rng.standard_normal(160_000)).astype(np.float32)

    def rows() -> Iterator[dict[str, Any]]:
        for index in range(number):
            start = int(rng.integers(80_000))
            waveform = noise[start : start + int(rng.integers(8_000, 80_000))]
            quality = {"entropy": rng.uniform(0.3, 0.9), "rms": rng.uniform(0, 0.3)}
            names = {"patient_id": str(index // 8), "recording_id": str(index), "device": "Meditron"}
            yield {"waveform": waveform, "label": index % 4, **quality, **names}

    names = {name: Value("string") for name in ("patient_id", "recording_id", "device")}
    dataset = Dataset.from_generator(rows, Features({**DECODED_FEATURES, **names}), cache_dir=folder)
    return dataset.cache_files[0]["filename"]


def open_rows(path: str) -> Dataset:
    """Open them memory-mapped, as `decode_cycles` gives rows."""
    return Dataset.from_file(path).with_format("numpy", columns=["waveform"], output_all_columns=True)


def settled(setting: Setting, batch_size: int, options: tuple[str, ...], folder: str) -> Arguments:
    """Give the arguments of a training that goes on until it is stopped, and writes nothing."""
    recipe = Path(folder) / "benchmark.yaml"
    recipe.write_text("about: {description: Every option at its default.}\n", encoding="utf-8")
    words = [
        f"--output_dir={folder}",
        f"--per_device_train_batch_size={batch_size}",
        "--select_on=last",
        "--validation_fraction=0",
        "--save_strategy=no",
        "--logging_strategy=no",
        "--disable_tqdm=true",
        "--max_steps=1000000",
    ]
    return parse([str(recipe), *words, *setting.encoder, *options])[1]


def train_steps(configuration: Configuration, setting: Setting, rows: str) -> Measurement:
    """Measure steps of our Trainer."""
    assert configuration.options is not None
    if configuration.attention is not None:
        backend = getattr(torch.nn.attention.SDPBackend, configuration.attention)
        torch.nn.attention.sdpa_kernel(backend).__enter__()
    with tempfile.TemporaryDirectory() as folder:
        arguments = settled(setting, configuration.batch_size, configuration.options, folder)
        train = open_rows(rows)
        trainer = build_trainer(train, None, fit_extractor(arguments[0], train), arguments)
        watch = StopwatchCallback(Stopwatch(setting), configuration.profiled)
        fetch = trainer.get_batch_samples
        trainer.get_batch_samples = lambda *args: watch.stopwatch.wait(lambda: fetch(*args))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        trainer.train()
    assert watch.result is not None, "a training of a million steps has ended"
    return watch.result


def patch_mix_steps(configuration: Configuration, setting: Setting, rows: str, folder: str) -> Measurement:
    """Measure steps of the published code."""
    watch = Stopwatch(setting)
    patch_mix.train(folder, open_rows(rows), watch, configuration.batch_size, configuration.autocast, setting.small)
    return watch.measurement(configuration.batch_size)


def step_flops(setting: Setting) -> int:
    """Count the operations of matrix products and convolutions in one clip's step, forward and backward."""
    with tempfile.TemporaryDirectory() as folder:
        data, model_arguments, _, _ = settled(setting, 1, (), folder)
    extractor = fit_extractor(data, Dataset.from_dict({"entropy": [0.4, 0.6], "rms": [0.1, 0.2]}))
    with FakeTensorMode():
        model = build_model(model_arguments, extractor.input_frames, FOUR_CLASS.classes, [1, 1, 1, 1])
        model.set_attn_implementation("eager")  # flash attention's backward computes the scores again, at its own cost
        features = torch.empty(1, extractor.max_length, extractor.feature_size)
        with FlopCounterMode(display=False) as counter:
            model(features).logits.sum().backward()
    return counter.get_total_flops()


def apart(function: Callable[..., Any], *args: Any, seconds: float) -> Any:
    """Call a function in a process of its own, whose settings, compiled code and memory end with it.

    Raises:
        RuntimeError: naming the function's own error, or if it has not ended after so many seconds.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(seconds) else RuntimeError(f"not done in {seconds:.0f} s")
    except EOFError:
        answer = RuntimeError("the process died")
    finally:
        process.terminate()
        process.join()
    if isinstance(answer, RuntimeError):
        raise answer
    return answer


def _answer(sender, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    multiprocessing.set_start_method(None, force=True)  # of a loader's workers: not handed down, but the usual one
    try:
        sender.send(function(*args))
    except Exception as error:  # out of memory, say: the other rows are wanted all the same
        sender.send(RuntimeError(f"{type(error).__name__}: {error}"))


def measure_all(
    configurations: tuple[Configuration, ...], setting: Setting, reference: str | None, minutes: float
) -> dict[Configuration, Measurement]:
    """Measure every row for which there is time."""
    end = time.monotonic() + 60 * minutes
    results: dict[Configuration, Measurement] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = simulate_rows(setting.rows, folder)
        for configuration in configurations:
            left = end - time.monotonic()
            if left < configuration.needs:
                results[configuration] = Measurement(error="no time was left")
            elif configuration.options is not None:
                results[configuration] = _measured(train_steps, configuration, setting, rows, seconds=left)
            elif reference is not None:
                results[configuration] = _measured(
                    patch_mix_steps, configuration, setting, rows, reference, seconds=left
                )
            else:
                results[configuration] = Measurement(error="left out: no --patch_mix FOLDER was given")
    return results


def _measured(function: Callable[..., Measurement], *args: Any, seconds: float) -> Measurement:
    try:
        return apart(function, *args, seconds=seconds)
    except RuntimeError as error:
        return Measurement(error=str(error))


def print_results(results: dict[Configuration, Measurement], flops: int, rate: float) -> None:
    """Print the table, slowest row first, then what time went to, and which rows are lacking and why."""
    done = sorted((pair for pair in results.items() if not pair[1].error), key=lambda pair: pair[1].clips_per_second)
    base = next((result.clips_per_second for row, result in done if row.name == PATCH_MIX), float("nan"))
    columns = ["step", "batch", "clips/s", "× Patch-Mix", "of matrix rate", "loader", "first batch", "peak memory"]
    print_table(
        columns,
        (
            [
                row.name,
                row.batch_size,
                f"{result.clips_per_second:.4g}",
                f"{result.clips_per_second / base:.2f}",
                f"{flops * result.clips_per_second / rate:.1%}",
                f"{result.loader_share:.1%}",
                f"{result.first_batch:.2f} s",
                f"{result.memory / 2**30:.1f} GiB" if result.memory else "–",
            ]
            for row, result in done
        ),
    )
    profiled = [(row, result) for row, result in done if result.profile]
    if profiled:
        print("\nWhere the time of a step goes (three steps under the profiler, which slows a CPU's down):\n")
        kinds = [*KINDS, "else", "idle"]
        rows = (
            [f"{row.name}, {row.batch_size}", *(f"{result.profile[k]:.1%}" for k in kinds)] for row, result in profiled
        )
        print_table(["step, batch", *kinds], rows)
    for row, result in results.items():
        if result.error:
            print(f"\n{row.name}, batch {row.batch_size}: {result.error}")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch_mix", metavar="FOLDER", help="A copy of Patch-Mix's code, the reference.")
    parser.add_argument("--minutes", type=float, default=9.0, help="No row is begun that would end after this (9).")
    arguments = parser.parse_args(argv)
    disable_progress_bars()
    on_gpu = torch.cuda.is_available()
    setting = Setting() if on_gpu else Setting(SMALL, rows=64, warmup=1, block=1, seconds=5.0, small=True)
    dtype, device = torch.bfloat16 if on_gpu else torch.float32, "cuda" if on_gpu else "cpu"
    rate, flops = apart(matmul_rate, dtype, device, seconds=60), step_flops(setting)
    print(f"{machine()}\n")
    print(
        f"{'AST base' if on_gpu else 'A small AST'} at 8 s. One clip forward and backward: {flops / 1e9:.4g} GFLOP in "
        f"matrix products; measured on a square one in {dtype}: {rate / 1e12:.4g} TFLOP/s. × Patch-Mix: against its "
        "step at the batch size it was published with (of this table, where there is no GPU).\n"
    )
    results = measure_all(ON_GPU if on_gpu else ON_CPU, setting, arguments.patch_mix, arguments.minutes)
    print_results(results, flops, rate)


if __name__ == "__main__":
    main()
