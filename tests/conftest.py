"""Every test starts from the same random state; drawn cases are the same in every run.

One thread: on the small tensors of these tests a second one costs more than it gives, most of all on a busy machine.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_random_state() -> None:
    torch.manual_seed(0)
