"""Training steps of the published Patch-Mix code (Bae et al. 2023), run from a copy outside this repository.

That code makes all features before it trains and keeps them in memory. Here its loader's processes make each clip's
when it is asked for, as a training on more recordings than memory holds would have to; its own functions do it, and
its own loop trains.
"""

import collections.abc
import contextlib
import functools
import importlib
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

if TYPE_CHECKING:
    from .training import Stopwatch

# Imported by the published code, and used by nothing that runs here.
UNUSED = (
    *("cmapy", "curses", "cv2", "librosa", "tkinter", "wget"),
    *("nlpaug", "nlpaug.augmenter", "nlpaug.augmenter.audio"),
)
OPTIONS = (  # of its script for AST with cross-entropy
    "--epochs=50 --optimizer=adam --learning_rate=5e-5 --weight_decay=1e-6 --cosine --model=ast --n_mels=128 "
    "--ma_update --ma_beta=0.5 --method=ce"
)


def train(folder: str, rows: Dataset, watch: "Stopwatch", batch_size: int, autocast: bool, small: bool) -> None:
    """Train until the stopwatch has seen enough.

    Args:
        folder: of the published code.
        rows: of `decode_cycles`, at 16 kHz.
        watch: times every step.
        batch_size: clips per step.
        autocast: in float16 where there is a GPU, the code's own mixed precision; otherwise float32.
        small: with the code's smallest encoder.

    Raises:
        ImportError: without torchvision or timm 0.4.5.
    """
    # Its code asks for autocast by itself, in the model's forward as well.
    torch.cuda.amp.autocast = functools.partial(torch.amp.autocast, "cuda", enabled=autocast)  # type: ignore[misc, assignment]
    code = _import(folder)
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = True  # as its `main` does
    with tempfile.TemporaryDirectory() as save_dir, contextlib.redirect_stdout(open(os.devnull, "w")):
        sys.argv = ["main.py", *OPTIONS.split(), f"--batch_size={batch_size}", f"--save_dir={save_dir}"]
        args = code.parse_args()
        args.h, args.w = 798, 128
        if small:
            get_class = code.get_backbone_class
            vars(code)["get_backbone_class"] = lambda name: functools.partial(get_class(name), model_size="tiny224")
        loader = _TimedLoader(
            DataLoader(
                _Clips(rows, code, args),
                batch_size,
                shuffle=True,
                num_workers=min(args.num_workers, os.cpu_count() or 1),
                pin_memory=True,
                drop_last=True,
            ),
            watch,
        )
        model, classifier, projector, criterion, optimizer = code.set_model(args)
        scaler = torch.amp.GradScaler("cuda", enabled=autocast)
        code.train(loader, model, classifier, projector, criterion, optimizer, 1, args, scaler)


class _Clips(TorchDataset):
    """Makes a row's features by the published functions."""

    def __init__(self, rows: Dataset, code: types.ModuleType, args: Any):
        transforms, util = code.transforms, sys.modules["util.icbhi_util"]
        self.rows, self.args = rows, args
        self.pad, self.make_features = util.cut_pad_sample_torchaudio, util.generate_fbank
        resize = transforms.Resize(size=(args.h, args.w))
        self.transform = transforms.Compose([transforms.ToTensor(), code.SpecAugment(args), resize])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        row = self.rows[index]
        clip = self.pad(torch.from_numpy(row["waveform"].copy())[None], self.args)
        return self.transform(self.make_features(clip, self.args.sample_rate, self.args.n_mels)), row["label"], 0


class _TimedLoader:
    """Hands out batches, epoch after epoch, until the stopwatch has seen enough steps."""

    def __init__(self, loader: DataLoader, watch: "Stopwatch"):
        self.loader, self.watch = loader, watch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            batch = self.watch.wait(lambda: next(batches, None))  # noqa: B023
            if batch is None:
                batches = iter(self.loader)
                continue
            yield batch
            if self.watch.step():
                return


def _import(folder: str) -> types.ModuleType:
    """Import the published code's `main`, with what torch and timm have dropped since."""
    for name in UNUSED:
        sys.modules.setdefault(name, _Absent(name))
    six = types.ModuleType("torch._six")
    six.container_abcs = collections.abc  # type: ignore[attr-defined]
    sys.modules["torch._six"] = six
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
        torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    sys.path.insert(0, folder)
    return importlib.import_module("main")


class _Absent(types.ModuleType):
    """Stands for a package whose contents are imported and not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")
