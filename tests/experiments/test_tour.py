"""The notebook runs from its first cell to its last, and is committed without outputs."""

import copy
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def tour():
    return nbformat.read(EXPERIMENTS / "tour.ipynb", as_version=4)


@pytest.mark.slow
def test_the_tour_runs_and_shows_what_it_says(tour, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several threads wait long for a busy core
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    done = nbclient.NotebookClient(
        copy.deepcopy(tour), timeout=600, resources={"metadata": {"path": EXPERIMENTS}}
    ).execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", ())]
    pictures = [o for o in outputs if "image/png" in o.get("data", ())]
    assert len(pictures) == 2
    text = "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)
    assert "tensor([[0., 1., 0.],\n        [1., 0., 1.]])" in text  # x > 0, where the mask is one
    assert "tensor([[10., 10.,  0.],\n        [10.,  0., 10.]])" in text  # straight through
    assert "tensor([[10., 10.,  0.],\n        [ 0.,  0., 10.]])" in text  # clipped
    assert text.count("target accuracy") == 2 and "layer1.1.conv1" in text


def test_the_tour_is_committed_without_outputs(tour):
    nbformat.validate(tour)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in tour.cells)
