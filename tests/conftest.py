"""What every test shares: as many threads as there are cores for it, one seed."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # workers share the cores

settings.register_profile("linger", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # cores may be busy
settings.load_profile("linger")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
