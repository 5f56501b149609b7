import pytest


@pytest.fixture
def no_pictures(monkeypatch):
    """For runs whose pictures nobody looks at: drawing them takes half of such a run's time."""
    monkeypatch.setattr("domainshift.training.run.draw", lambda *_: None)
