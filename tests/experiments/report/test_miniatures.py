"""The committed miniatures: their pages follow from their records, by the rules of today's suites."""

import csv
import tarfile

import pytest
from domainshift import files
from domainshift.config import REPOSITORY
from domainshift.records.schema import ClaimIndex
from domainshift.report import contents, render
from domainshift.report.study import read_study
from domainshift.sweep.schema import read_suite

MINI = REPOSITORY / "experiments" / "results" / "mini"
NAMES = ("controls", "report-a", "report-b", "study")


@pytest.fixture(scope="module", params=NAMES)
def unpacked(request, tmp_path_factory):
    """Name of a suite and the folder of its records."""
    place = tmp_path_factory.mktemp(request.param)
    with tarfile.open(MINI / request.param / "records.tar.xz") as archive:
        archive.extractall(place, filter="data")
    return request.param, place / f"{request.param}-mini"


def parted(row):
    """The numbers of a row of CSV, and its texts with a gap for each number."""
    texts, numbers = [], []
    for cell in row:
        try:
            numbers.append(float(cell))
            texts.append(None)
        except ValueError:
            texts.append(cell)
    return texts, numbers


@pytest.mark.slow
def test_pages_follow_from_the_records(unpacked):
    name, folder = unpacked
    built = contents.build(read_study(folder))
    assert render.markdown(built) == (MINI / name / "report.md").read_text()
    ours = csv.reader(render.as_csv(built).splitlines())
    kept = csv.reader((MINI / name / "report.csv").read_text().splitlines())
    for row, expected in zip(
        ours, kept, strict=True
    ):  # other versions of scipy may round otherwise
        (texts, numbers), (their_texts, their_numbers) = parted(row), parted(expected)
        assert texts == their_texts
        assert numbers == pytest.approx(their_numbers, rel=1e-9, abs=1e-12)


def test_records_have_the_claims_of_the_suite(unpacked):
    name, folder = unpacked
    index, suite = files.read_json(folder / "suite.json"), read_suite(name).in_profile("mini")
    claims = {n: ClaimIndex(**c.given()).model_dump(mode="json") for n, c in suite.claims.items()}
    assert index["claims"] == claims
    assert index["primary"] == [list(pair) for pair in suite.primary]
    assert index["margin"] == suite.margin
