"""Every test starts from the same random state and uses two threads; drawn cases are the same in every run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _fixed_random_state() -> None:
    torch.manual_seed(0)
