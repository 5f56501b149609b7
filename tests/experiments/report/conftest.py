"""Fixtures of the tests of reports."""

import pytest
from domainshift import files


@pytest.fixture(autouse=True, scope="package")
def no_waiting_for_the_disk():
    """Made records need not survive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda handle: None)
        yield
