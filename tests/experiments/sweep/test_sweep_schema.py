"""The YAML of a suite: what is refused, in which words, and how it is documented."""

import re

import pytest
from domainshift.sweep import schema
from domainshift.sweep.command import main
from domainshift.sweep.schema import read_suite
from small_suites import GRID, small, table

FAULTS = {
    "unknown key of the suite": ({"runs": []}, r"small.yaml: unknown key 'runs'; allowed: title"),
    "unknown key of a table": (
        {"tables": {"one": table(layers=3)}},
        r"small.yaml: table one: unknown key 'layers'; allowed: title, note",
    ),
    "unknown key of a profile": (
        {"profiles": {"full": {"seed": 3}}},
        r"small.yaml: profile full: unknown key 'seed'; allowed: defaults",
    ),
    "a profile of a table that is not there": (
        {"profiles": {"full": {"tables": {"two": {}}}}},
        r"small.yaml: profile full: no table 'two'; there are one",
    ),
    "a missing key": ({"tables": {"one": {"arms": {}}}}, r"table one: the key 'title' is missing"),
    "one seed twice": ({"seeds": [1, 1]}, r"seeds: \[1, 1\] is not allowed; allowed: a list of"),
    "a seed that is no number": (
        {"seeds": [1, "1"]},
        r"seeds: '1' is not allowed; allowed: a list of different whole numbers",
    ),
    "a negative seed": ({"seeds": [-1]}, r"seeds: -1 is not allowed; allowed: .* numbers from 0"),
    "seeds that are no list": ({"seeds": 3}, r"seeds: 3 is not allowed; allowed: a list"),
    "a source that is a number": ({"sources": [3]}, r"sources: 3 is not allowed; allowed: a list"),
    "no targets": ({"targets": []}, r"targets: \[\] is not allowed; allowed: a list"),
    "a baseline that is a list": (
        {"tables": {"one": table(baseline=["b"])}},
        r"small.yaml: table one: baseline: \['b'\] is not allowed; allowed: the name of an arm",
    ),
    "a table whose name is a number": (
        {"tables": {1: table()}},
        r"small.yaml: tables: 1 is not allowed as a name; allowed: text",
    ),
    "an arm whose name is a number": (
        {"tables": {"one": table(arms={1: {}})}},
        r"small.yaml: table one: arms: 1 is not allowed as a name; allowed: text",
    ),
    "an arm that is no mapping": (
        {"tables": {"one": table(arms={"a": 3})}},
        r"small.yaml: table one: arms: a: 3 is not allowed; allowed: switches by name",
    ),
    "a table that is a list": (
        {"tables": {"one": []}},
        r"small.yaml: table one: \[\] is not allowed; allowed: a mapping of keys",
    ),
    "defaults that are a list": ({"defaults": []}, r"small.yaml: defaults: \[\] is not allowed"),
    "a note that is a mapping": (
        {"tables": {"one": table(note={"a": "b"})}},
        r"table one: note: \{'a': 'b'\} is not allowed; allowed: text",
    ),
    "a title that is a list": ({"title": [1, 2]}, r"small.yaml: title: \[1, 2\] is not allowed"),
    "a table's title that is a number": (
        {"tables": {"one": table(title=3)}},
        r"table one: title: 3 is not allowed; allowed: text",
    ),
    "a note of a profile": (
        {"profiles": {"full": {"tables": {"one": {"note": 3}}}}, "tables": {"one": table()}},
        r"profile full: table one: note: 3 is not allowed; allowed: text",
    ),
    "a name that is a list": (
        {"tables": {"one": table(**GRID, name=["r"])}},
        r"table one: name: \['r'\] is not allowed; allowed: text",
    ),
    "no tables": ({"tables": {}}, r"tables: \{\} is not allowed; allowed: at least one table"),
    "labels that are no list": (
        {"tables": {"one": table(published="report-B report T3")}},
        r"table one: published: 'report-B report T3' is not allowed; allowed: a list",
    ),
    "a grid of one value": (
        {"tables": {"one": table(grid={"p_zero": 0.5}, name="r")}},
        r"table one: grid: p_zero: 0.5 is not allowed; allowed: a list of values",
    ),
    "something else to compare": (
        {"tables": {"one": table(compare=["a", "b"])}},
        r"table one: compare: 'a' is not allowed; allowed: a list of \[arm, reference\]",
    ),
    "an arm to compare with itself": (
        {"tables": {"one": table(compare=[["a", "a"]])}},
        r"table one: compare: \['a', 'a'\] is not allowed",
    ),
}


@pytest.mark.parametrize("changes, message", FAULTS.values(), ids=FAULTS)
def test_faults_are_named_in_one_line(changes, message, tmp_path, capsys):
    out = tmp_path / "out"
    for how in ([], ["--dry-run"]):
        assert main([small(tmp_path, **changes), "--out", str(out), *how]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert len(error.splitlines()) == 1 and error.startswith("suite.py: error: ")
        assert not out.exists()


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "title: a\ntables:\n  x: {}\n  y: {}\n  x: {}\n",
            "s.yaml: 'x' is there twice, in lines 3 and 5",
        ),
        ("? [a]\n: b\n", "s.yaml: line 1: ['a'] is not allowed as a key"),
        ("[", "cannot read"),
        ("3", "s.yaml: 3 is not allowed; allowed: a mapping of keys"),
        ("", "s.yaml: None is not allowed; allowed: a mapping of keys"),
    ],
)
def test_faults_of_the_yaml(text, message, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(text)
    assert main([str(tmp_path / "s.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_suite_without_profiles_has_one(tmp_path):
    suite = read_suite(small(tmp_path))
    assert suite.in_profile("full") == suite
    with pytest.raises(schema.SuiteError, match="profile: 'mini' is not allowed; allowed: full"):
        suite.in_profile("mini")


def test_a_profile_replaces_keys(tmp_path):
    suite = read_suite(
        small(
            tmp_path,
            defaults={"epochs": 2, "lr": 0.5},
            tables={"one": table(note="n", switches={"momentum": 0.5})},
            profiles={
                "mini": {
                    "defaults": {"epochs": 3},
                    "seeds": [7],
                    "tables": {"one": {"switches": {"gamma": 0.5}, "targets": ["photo"]}},
                }
            },
        )
    )
    mini = suite.in_profile("mini")
    assert (mini.defaults, mini.seeds) == ({"epochs": 3, "lr": 0.5}, [7])
    (one,) = mini.tables.values()
    assert (one.switches, one.targets, one.note) == ({"gamma": 0.5}, ["photo"], "n")
    assert one.arms == table()["arms"]
    assert suite.in_profile("full").tables["one"].switches == {"momentum": 0.5}


def test_the_documentation_has_every_key(capsys):
    assert main(["--schema"]) == 0
    text = capsys.readouterr().out
    for model in (schema.Suite, schema.Table, schema.Profile):
        for name, field in model.model_fields.items():
            assert re.search(rf"^  {name}\s+{re.escape(field.description)}", text, re.M), name
            assert field.json_schema_extra["allowed"] in text


def test_help_lists_the_suites_and_names_the_schema(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in schema.known_suites():
        assert f"{name} ({read_suite(name).title})" in text
    assert "suite.py --schema explains the YAML of a suite" in text
