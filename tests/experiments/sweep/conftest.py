import pytest
from stand_in_worker import Stand


@pytest.fixture
def stand(tmp_path, monkeypatch):
    """Twelve trainings, by a program that only pretends to train."""
    return Stand(tmp_path, monkeypatch, trainings=12)
