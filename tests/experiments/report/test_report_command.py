"""The command report.py: its exit status, and the dictionary of the records."""

import pytest
from domainshift.records import schema
from domainshift.report import command
from domainshift.report.dictionary import dictionary, parts_of
from made_records import SMALL, write_suite


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["nowhere", "--audit"]])
def test_words_that_are_no_command(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2
    assert "usage: report.py" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--audit-only"]])
def test_bad_input(arguments, tmp_path, capsys):
    assert command.main([str(tmp_path / "nowhere"), *arguments]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert command.main([str(tmp_path), *arguments]) == 2
    assert "holds neither suite.json nor the record of a run" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys):
    folder = write_suite(tmp_path / "s", SMALL.replace("seeds: [0, 1, 2]", "seeds: [0]"))
    assert command.main([str(folder), "--out", str(tmp_path / "nowhere" / "x.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("report.py: error: cannot write") and len(error.splitlines()) == 1


def test_a_folder_whose_name_is_not_in_utf8(tmp_path):
    suite = SMALL.replace("seeds: [0, 1, 2]", "seeds: [0]")
    folder = write_suite(tmp_path / "\udcff", suite)
    command.main([str(folder)])
    assert (folder / "report.html").exists()


def test_the_dictionary_has_every_field_of_every_record(capsys):
    assert command.main(["--records"]) == 0
    text = capsys.readouterr().out
    assert text == dictionary() + "\n"
    for record in (schema.Row, schema.TrainingRecord, schema.EvaluationRecord, schema.SuiteIndex):
        for part in (record, *parts_of(record)):
            section = text.split(f"## {part.__name__}")[1].split("\n## ")[0]
            for name in part.model_fields:
                assert f"| `{name}` | `" in section, (part, name)


def test_confusion_matrices_say_which_axis_is_which():
    row = next(line for line in dictionary().splitlines() if line.startswith("| `confusion`"))
    assert "[true class][predicted class]" in row and "list[list[int]]" in row
