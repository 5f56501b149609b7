"""Brackets in the paths that a command prints are text, and so is what the output cannot encode.

As markup of rich, "[red]" would vanish, and "[/b]" end a style that never began: rich raises an error.
"""

import io
import json
import sys

import pytest
from domainshift import command, progress
from domainshift.data import command as data_command
from domainshift.data import folder
from domainshift.progress import Screen
from domainshift.report import command as report_command
from domainshift.sweep import command as sweep_command
from made_folders import encoded, make_squares
from rich.console import Console

DOMAINS, CLASSES = ("[bold]one", "two"), ("[red]cat", "cow")


@pytest.fixture
def place(tmp_path):
    """A folder whose path would be markup."""
    result = tmp_path / "a[" / "b]"
    result.mkdir(parents=True)
    assert "[/b]" in str(result)
    return result


@pytest.fixture
def squares(place):
    root = make_squares(place / "[red]squares", 16, domains=DOMAINS, classes=CLASSES)
    (root / "two" / "cow" / "[red]note.txt").write_text("not an image")
    return root


@pytest.fixture(params=["pipe", "terminal"])
def printed(request, monkeypatch, place):
    """What a command prints to standard output, without line breaks."""
    file = io.StringIO()
    options = {"file": file, "soft_wrap": True, "highlight": False, "color_system": None}
    terminal = request.param == "terminal"
    console = Console(force_terminal=terminal, width=300, **options)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    monkeypatch.setattr(folder, "DATA_FOLDER", place / "data")
    return lambda: file.getvalue().replace("\n", " ")


@pytest.mark.parametrize("printed", ["terminal"], indirect=True)
def test_a_progress_bar(printed, place):
    with Screen().progress(f"decoding [red]{place}", 2) as advance:
        advance(2)
    assert f"decoding [red]{place}" in printed()


def test_data_verify(squares, printed):
    assert data_command.main(["verify", str(squares)]) == 0
    out = printed()
    for text in (f"images in {squares}", *DOMAINS, *CLASSES, "[red]note.txt"):
        assert text in out


def test_data_fetch(place, printed, capsys):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = {"bytes": encoded(1, "PNG"), "path": "1.png"}
    row = {"image": image, "domain": "sketch", "label": 0}
    parquet.write_table(pa.Table.from_pylist([row]), place / "[red].parquet")
    to = place / "[red]PACS"
    assert data_command.main(["fetch", "--from", str(place), "--to", str(to)]) == 2  # one domain
    assert f"writing 1 images to {to}" in printed()
    assert "a[/b]" in capsys.readouterr().err


def test_data_augmentation(place, squares, printed):
    path = place / "[red].png"
    assert data_command.main(["augmentation", str(path), "--data", str(squares)]) == 0
    assert f"{path}: largest difference" in printed() and path.is_file()


@pytest.mark.parametrize("words", [["verify", "{}"], ["augmentation", "{}.png", "--data", "{}"]])
def test_errors_of_data(place, capsys, words):
    missing = place / "[red]nowhere"
    assert data_command.main([word.format(missing) for word in words]) == 2
    assert str(missing) in capsys.readouterr().err


def test_run_then_report(place, squares, printed, capsys):
    """The run also says its strays once, and its record has them."""
    out = place / "[red]out" / "run"
    switches = (
        "--source two --target [bold]one --weights none --image-size 32 --updates 1 --batch-size 4 "
        "--device cpu --pipeline reference"
    ).split()
    assert command.main([*switches, "--data", str(squares), "--out", str(out)]) == 0
    assert f"record: {out}" in printed() and "[bold]one" in printed()
    remark = (
        "[red]squares: ignored 1 entry with 0 images (other file: 1): 'two/cow/[red]note.txt'; "
        f"to see all: python experiments/data.py verify '{squares}'"
    )
    assert printed().count(remark) == 1
    assert remark in json.loads((out / "training.json").read_text())["warnings"]

    assert report_command.main([str(out.parent)]) == 0
    assert str(out.parent / "report.html") in capsys.readouterr().out


def test_suite(place, squares, printed, capsys):
    """Of the toy: a suite names its domains."""
    words = ["toy", "--dry-run", "--out", str(place / "[red]suite")]
    assert sweep_command.main(words) == 0
    assert "0 of 25 trainings" in printed()
    assert sweep_command.main([*words, "--data", str(place / "[red]nowhere")]) == 2
    assert str(place / "[red]nowhere") in capsys.readouterr().err


def test_names_that_the_output_cannot_encode_are_printed_as_escapes(tmp_path, monkeypatch):
    """As with PYTHONIOENCODING=ascii, or where the locale has another encoding."""
    root = make_squares(tmp_path / "\u00e9", domains=("\u00e9\u00e9n", "two"))
    out = io.BytesIO()
    monkeypatch.setattr(folder, "DATA_FOLDER", tmp_path / "data")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii", write_through=True))
    assert data_command.main(["verify", str(root)]) == 0
    assert rb"\xe9\xe9n" in out.getvalue()


def test_verify_needs_no_cache(tmp_path, monkeypatch):
    root = make_squares(tmp_path / "squares")
    (tmp_path / "file").touch()
    monkeypatch.setattr(folder, "DATA_FOLDER", tmp_path / "file")
    assert data_command.main(["verify", str(root)]) == 0
