import pytest
import torch

from .cuda_emulator import emulated, emulator  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tests' tensors are small: a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
