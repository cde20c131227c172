"Fixtures that several test files share"
import pytest, torch


@pytest.fixture
def one_thread():
    "Layers as small as those of the tests run faster on one thread, much faster on a busy machine"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
