"""What the tests of every room share: where the real recordings are, and a small model."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

torch.set_num_threads(1)  # tests run beside each other


def _recordings(name: str) -> Path:
    root = os.environ.get("QLUNG_DATA")
    if not root:
        pytest.skip(f"QLUNG_DATA is not set: real recordings of {name} are not tested")
    folder = Path(root) / name
    if not folder.is_dir():
        pytest.skip(f"QLUNG_DATA={root} holds no {name}")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A `HubStandIn` that this process takes for the Hub, logged in."""
    import huggingface_hub.constants  # not before HF_HUB_OFFLINE is set

    from tests.hub_stand_in import TOKEN, hub_stand_in

    with hub_stand_in() as running:
        for name, value in {"ENDPOINT": running.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture(scope="session")
def real_icbhi() -> Path:
    """Folder that holds ICBHI_final_database."""
    return _recordings("icbhi_2017")


@pytest.fixture(scope="session")
def real_sprsound() -> Path:
    """Folder that holds BioCAS2022."""
    return _recordings("sprsound_2022")
