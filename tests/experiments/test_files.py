"""Files are whole or absent."""

import json
import os

import pytest
from domainshift import files
from domainshift.errors import RecordError
from full_disk import FullDisk


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"k": 1})
    files.write_json(path, {"k": 2})
    assert json.loads(path.read_text()) == {"k": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    files.write_bytes(path, b"first")
    monkeypatch.setattr(files, "open", lambda *a, **k: FullDisk(open(*a, **k)), raising=False)
    with pytest.raises(RecordError, match="checkpoint.pt: No space left.*old one is untouched"):
        files.write_bytes(path, b"second")
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_processes_with_one_number_do_not_meet(tmp_path, monkeypatch):
    """As those of two containers that share a folder."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "cache.npy"
    with files.replacing(path) as first:
        first.write(b"first")
        with files.replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        (temporary,) = tmp_path.glob(".*.part")  # as runs look for what a kill left
        assert temporary.name.startswith(".cache.npy.7-")
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["cache.npy"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(RecordError, match="cannot write .*nowhere.*it was not written"):
        files.write_json(tmp_path / "nowhere" / "a.json", {})


@pytest.mark.parametrize("text", ["- a\n- b\n", "{", "just words", "a: 1\n  b: 2"])
def test_a_file_without_a_mapping_is_named_in_one_line(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(RecordError, match="config.yaml") as caught:
        files.read_yaml(path)
    assert "\n" not in str(caught.value)


def test_yaml_reads_what_it_wrote(tmp_path):
    value = {"b": [1, "two", None], "a": {"x": 1.5}, "on": "off"}
    files.write_yaml(tmp_path / "a.yaml", value)
    assert files.read_yaml(tmp_path / "a.yaml") == value
    assert list(files.read_yaml(tmp_path / "a.yaml")) == ["b", "a", "on"]


def test_yaml_runs_no_code(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(RecordError, match="cannot read"):
        files.read_yaml(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_takes_no_number_that_it_lacks(tmp_path, value):
    with pytest.raises(RecordError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"loss": value})
    with pytest.raises(RecordError, match="not JSON compliant"):
        files.append_json_line(tmp_path / "a.jsonl", {"loss": value})
    assert not list(tmp_path.iterdir())


def test_lines_are_appended(tmp_path):
    path = tmp_path / "a.jsonl"
    for epoch in (1, 2):
        files.append_json_line(path, {"epoch": epoch})
    assert files.read_json_lines(path) == [{"epoch": 1}, {"epoch": 2}]
    whole = path.read_text()
    assert whole.count("\n") == 2


def test_a_torn_last_line_is_skipped_where_it_may_be_torn(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"epoch": 1}\n{"epo')
    assert files.read_json_lines(path, torn=True) == [{"epoch": 1}]
    with pytest.raises(RecordError, match="line 2 is half-written"):
        files.read_json_lines(path)
    path.write_text('{"epo\n{"epoch": 2}\n')
    with pytest.raises(RecordError, match="line 1 is half-written"):
        files.read_json_lines(path, torn=True)
