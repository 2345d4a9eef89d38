import pytest

from services.store.memory import MemoryStore
from tests.fakes.clock import FakeClock


@pytest.fixture
def fake_clock():
    return FakeClock()


@pytest.fixture
async def memory(fake_clock):
    async with MemoryStore(fake_clock) as store:
        yield store
