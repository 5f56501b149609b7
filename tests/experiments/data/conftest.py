"""Tiny data sets, which a test may break."""

import shutil
from pathlib import Path

import pytest
from domainshift.data import pacs
from made_folders import make_office, make_pacs


@pytest.fixture(scope="session")
def pacs_original(tmp_path_factory):
    return make_pacs(tmp_path_factory.mktemp("original") / "PACS")


@pytest.fixture
def tiny_pacs(pacs_original, tmp_path):
    return Path(shutil.copytree(pacs_original, tmp_path / "PACS"))


@pytest.fixture
def two_each(monkeypatch):
    """The tiny PACS is the official one."""
    monkeypatch.setattr(pacs, "OFFICIAL_COUNTS", {name: (2,) * 7 for name in pacs.DOMAINS})


@pytest.fixture
def office(tmp_path):
    return make_office(tmp_path / "OfficeHome")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"
