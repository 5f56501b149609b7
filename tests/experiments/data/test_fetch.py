"""data.py fetch: PACS from parquet files, whole, once, and nowhere else."""

import builtins
import json
import os
import sys
import types

import numpy as np
import pytest
from domainshift.data import open_data
from domainshift.data.command import main
from domainshift.data.fetch import fetch as fetch_to
from domainshift.data.pacs import CLASSES, DOMAINS
from domainshift.errors import DataError
from domainshift.progress import Screen
from made_folders import encoded, picture


def fetch(to, source=None):
    fetch_to(to, source, Screen())


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    return status, problems, out, err


@pytest.fixture(scope="module")
def rows():
    """Two images per class and domain, in the columns of the public data set."""
    rows, number = [], 1000
    for domain in DOMAINS:
        for label, _ in enumerate(CLASSES):
            for i in range(2):
                kind = "PNG" if domain == "sketch" else "JPEG"
                image = {"bytes": encoded(number, kind), "path": f"pic_{i:03d}.jpg"}
                rows.append({"image": image, "domain": domain, "label": label})
                number += 1
    return rows


def write_parquet(path, rows, names=CLASSES):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("domain", pa.string()),
            ("label", pa.int64()),
        ]
    )
    if names is not None:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# --- from local files ---


def test_from_a_file_then_read(tmp_path, rows, two_each, capsys, cache):
    source = write_parquet(tmp_path / "pacs.parquet", rows)
    to = tmp_path / "data" / "PACS"
    status, problems, out, err = run(capsys, "fetch", "--from", source, "--to", to)
    assert (status, problems, err) == (0, [], "")
    assert "all right: this is PACS" in out
    written = contents(to)
    assert len(written) == 56
    assert written["photo/dog/pic_001.jpg"] == rows[29]["image"]["bytes"]
    assert written["sketch/dog/pic_000.png"] == rows[42]["image"]["bytes"]  # by content, not name
    assert sorted(written.values()) == sorted(row["image"]["bytes"] for row in rows)
    domain = open_data(to, cache).load("sketch")
    np.testing.assert_array_equal(domain.images[13], np.asarray(picture(1055)))


def test_from_a_folder_of_parts_gives_the_same(tmp_path, rows):
    write_parquet(tmp_path / "parts" / "data" / "train-00000-of-00002.parquet", rows[:20])
    write_parquet(tmp_path / "parts" / "data" / "train-00001-of-00002.parquet", rows[20:])
    fetch(tmp_path / "a", tmp_path / "parts")
    fetch(tmp_path / "b", write_parquet(tmp_path / "whole.parquet", rows))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_it_continues_after_an_interruption(tmp_path, rows, monkeypatch, capsys):
    source = write_parquet(tmp_path / "pacs.parquet", rows)
    replace, left = os.replace, 10

    def interrupted(*paths):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(DataError, match=r"cannot write .*No space left"):
        fetch(tmp_path / "PACS", source)
    assert len(contents(tmp_path / "PACS")) == 10  # whole files only, no temporary one
    monkeypatch.setattr(os, "replace", replace)

    first = tmp_path / "PACS" / "art_painting" / "dog" / "pic_000.jpg"
    os.utime(first, ns=(10**18, 10**18))
    fetch(tmp_path / "PACS", source)
    assert "wrote 46 images, kept 10 that were there" in capsys.readouterr().out
    assert len(contents(tmp_path / "PACS")) == 56
    assert first.stat().st_mtime_ns == 10**18  # kept, not written again


def test_it_does_not_overwrite_other_contents(tmp_path, rows):
    source = write_parquet(tmp_path / "pacs.parquet", rows)
    mine = tmp_path / "PACS" / "art_painting" / "dog" / "pic_000.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"pic_000.jpg is there already with other contents"):
        fetch(tmp_path / "PACS", source)
    assert mine.read_bytes() == b"mine"


def test_names_are_unique_and_stay_inside(tmp_path, rows):
    changed = [{**row, "domain": "photo", "label": 0} for row in rows[:8]]
    paths = ["a.jpg", "a.jpg", "A.jpg", None, "../../../etc/passwd", "some where/.b c.jpg"]
    paths += ["D.jpg", "d.jpg"]
    for row, path in zip(changed, paths, strict=True):
        row["image"] = {**row["image"], "path": path}
    fetch(tmp_path / "PACS", write_parquet(tmp_path / "pacs.parquet", changed))
    assert sorted(contents(tmp_path / "PACS")) == sorted(
        f"photo/dog/{name}.jpg"
        for name in ("a", "a_2", "A_3", "00003", "passwd", "b_c", "D", "d_2")
    )


# --- bad files ---


def test_another_label_order(tmp_path, rows):
    source = write_parquet(tmp_path / "p.parquet", rows, names=reversed(CLASSES))
    with pytest.raises(DataError, match=r"orders its labels person, house.*expected dog, el"):
        fetch(tmp_path / "PACS", source)
    assert not (tmp_path / "PACS").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": 7}, r"row 0: label is 7, but must be 0 to 6"),
        ({"label": None}, r"row 0: label is None"),
        ({"domain": "clipart"}, r"domain 'clipart' is unknown; known are"),
        ({"image": {"bytes": None, "path": "a.jpg"}}, r"the image column holds no bytes"),
        ({"image": {"bytes": b"GIF89a", "path": "a.gif"}}, r"neither JPEG nor PNG"),
    ],
)
def test_a_bad_row(tmp_path, rows, change, message):
    source = write_parquet(tmp_path / "p.parquet", [{**rows[0], **change}], names=None)
    with pytest.raises(DataError, match=message):
        fetch(tmp_path / "PACS", source)


def test_a_label_against_its_path(tmp_path, rows):
    image = {**rows[0]["image"], "path": "kfold/photo/horse/pic_000.jpg"}
    source = write_parquet(tmp_path / "p.parquet", [{**rows[0], "image": image}], names=None)
    with pytest.raises(DataError, match=r"label 0 is dog, but its path is kfold/photo/horse"):
        fetch(tmp_path / "PACS", source)


def test_other_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"image": [b""], "label": [0]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"has no column domain; it has image, label"):
        fetch(tmp_path / "PACS", tmp_path / "p.parquet")


def test_no_parquet(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(DataError, match=rf"no parquet file at .*{name}"):
            fetch(tmp_path / "PACS", tmp_path / name)
    (tmp_path / "p.parquet").write_bytes(b"PAR0 not at all")
    with pytest.raises(DataError, match=r"p.parquet cannot be read as parquet"):
        fetch(tmp_path / "PACS", tmp_path / "p.parquet")


# --- from the public home ---


def fake_hub(monkeypatch, snapshot_download):
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


def test_it_downloads_the_public_data_set(tmp_path, rows, two_each, monkeypatch, capsys):
    asked = {}

    def snapshot_download(**arguments):
        asked.update(arguments)
        write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", rows)
        return str(tmp_path / "hub")

    fake_hub(monkeypatch, snapshot_download)
    status, problems, _, _ = run(capsys, "fetch", "--to", tmp_path / "PACS")
    assert (status, problems) == (0, [])
    assert asked["repo_id"] == "flwrlabs/pacs" and asked["repo_type"] == "dataset"


def test_without_network(tmp_path, monkeypatch, capsys):
    def snapshot_download(**arguments):
        raise ConnectionError("Network is unreachable\nand a long story")

    fake_hub(monkeypatch, snapshot_download)
    with pytest.raises(DataError):
        fetch(tmp_path / "PACS")
    status, _, _, err = run(capsys, "fetch", "--to", tmp_path / "PACS")
    assert status == 2
    assert len(err.splitlines()) == 1
    for part in ("Network is unreachable", "--from", "sketchx.eecs.qmul.ac.uk", "--data toy"):
        assert part in err
    assert not (tmp_path / "PACS").exists()


def test_without_the_packages(tmp_path, rows, monkeypatch):
    source = write_parquet(tmp_path / "p.parquet", rows[:1])
    real_import = builtins.__import__

    def no_package(name, *arguments, **keywords):
        if name.split(".")[0] in ("huggingface_hub", "pyarrow"):
            raise ImportError(f"No module named {name}")
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", no_package)
    for where in (None, source):
        with pytest.raises(DataError, match=r"pip install huggingface_hub pyarrow"):
            fetch(tmp_path / "PACS", where)
