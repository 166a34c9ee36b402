"""What every test shares: as many threads as there are cores for it, one seed, no chip that another module read from a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import fill
from hypothesis import HealthCheck, settings

from linger import targets

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # workers share the cores

settings.register_profile("linger", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # cores may be busy
settings.load_profile("linger")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _chips() -> Iterator[None]:
    """A chip read from a file is known by its name for the rest of the process; another module may mean another one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "_KNOWN", dict(targets._KNOWN))
        patch.setattr(targets, "_FILES", dict(targets._FILES))
        yield


@pytest.fixture(scope="module")
def command_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands are run on; of the module, so that its net is exported once."""
    folder = tmp_path_factory.mktemp("cli")
    fill(folder)
    return folder


@pytest.fixture
def in_command_folder(command_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(command_folder)
