"""benchmarks/profile_step.py: the table has all ways, and its counts are right. benchmarks/instructions.py: its calls."""

import csv
import json

import instructions
import profile_step
import pytest
import table
from profile_step import BETWEEN, MEASURES, RECORDING, STEP, WAYS

import fastshape

LAYERS = {"replace-1-4": 2, "hooks-1-4": 2, "replace-17": 17}


@pytest.fixture(scope="module")
def profiles():
    """The value of each way by (what, unit), and the calls of each op by way."""
    rows, ops = profile_step.profile_ways(batch=2, side=32, steps=1, device="cpu")
    values = {(row["what"], row["unit"]): {way: float(row[way]) for way in WAYS} for row in rows}
    return values, ops


def test_every_way_is_measured(profiles):
    values, ops = profiles
    assert list(values) == MEASURES and ops.keys() == WAYS.keys()
    for way in WAYS:
        for group in (STEP, "convolution", "BatchNorm", "ReLU", "optimizer", BETWEEN):
            assert values[group, "ms"][way] > 0, (way, group)
        assert values["allocations", "MB"][way] > values["allocations", "calls"][way] * 1e-6


def test_a_shaped_layer_calls_two_ops_of_fastshape(profiles):
    """One op forward, one backward, and no copies."""
    values, ops = profiles
    calls = values["shaping", "calls"]
    assert calls["unshaped"] == 0 and not any("fastshape" in op for op in ops["unshaped"])
    for way, layers in LAYERS.items():
        assert calls[way] == 2 * layers
        assert sum(n for op, n in ops[way].items() if op.startswith("fastshape::")) == 2 * layers
        if fastshape.backend_info()["cpu"] == "native":  # the reference itself uses these ops
            for op in ("aten::copy_", "aten::clone", "aten::contiguous"):
                assert ops[way][op] == ops["unshaped"][op], (way, op)
    # A ResNet-18 has 20 BatchNorms and 17 ReLUs. 17 BatchNorms and 9 ReLUs are replaced, with their backward.
    assert values["BatchNorm", "calls"]["unshaped"] == 2 * 20
    assert values["BatchNorm", "calls"]["replace-17"] == 2 * (20 - 17)
    assert values["ReLU", "calls"]["unshaped"] == 2 * 17
    assert values["ReLU", "calls"]["replace-17"] == 2 * (17 - 9)


def test_recording_ends_at_its_layer(profiles):
    values, ops = profiles
    assert values["shaping", "calls"]["target-4"] == 2
    assert ops["target-4"]["fastshape::pack"] == 1
    assert ops["target-4"]["aten::conv2d"] == ops["unshaped"]["aten::conv2d"] + 4
    recording = values[RECORDING, "calls"]
    assert recording["target-4"] > 4 and set(recording.values()) == {0, recording["target-4"]}


def test_an_op_counts_for_the_outermost_group(profiles):
    """The reference shapes with many ops of torch. All of them count as shaping, and none is an op of fastshape."""
    values, ops = profiles
    assert values["shaping", "calls"]["reference-1-4"] > 100
    assert not any("fastshape" in op for op in ops["reference-1-4"])
    others = values["other ops", "calls"]
    draws = 2  # a state for each layer
    assert others["reference-1-4"] == others["hooks-1-4"] == others["unshaped"] + draws


def test_differences_list_the_ops_that_differ():
    one, other = profile_step.Counter(a=1, b=2), profile_step.Counter(a=1, b=5, c=1)
    assert profile_step.differences(one, other) == "-3 b, -1 c"


def test_the_command_writes_the_table_and_a_trace(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile_step, "WAYS", {w: WAYS[w] for w in ("unshaped", "replace-1-4")})
    monkeypatch.setattr(table, "facts", lambda processor, date, device: {"processor": "any"})
    table_file, trace = tmp_path / "profile.csv", tmp_path / "trace.json"
    arguments = ["--batch", "2", "--side", "32", "--steps", "1", "--save", str(table_file)]
    monkeypatch.setattr("sys.argv", ["profile", *arguments, "--trace", "replace-1-4", str(trace)])
    profile_step.main()
    rows = list(csv.DictReader(line for line in table_file.open() if not line.startswith("#")))
    assert [(row["what"], row["unit"]) for row in rows] == MEASURES
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {STEP, "fastshape::shaped_batch_norm_"} <= names
    output = capsys.readouterr().out
    assert "| shaping | calls | 0 | 4 |" in output and "+2 fastshape::shaped_batch_norm_" in output


def test_an_unknown_way_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["profile", "--trace", "unknown", "file"])
    with pytest.raises(SystemExit):
        profile_step.main()
    assert "'unknown' is not allowed; allowed: unshaped, replace-1-4" in capsys.readouterr().err


def test_instructions_are_counted_case_by_case():
    """The warm-up calls do nothing. Then each case is called as often as callgrind counts at a time."""
    *calls, last = instructions.turns(warm_up=10)
    assert len(calls) + 1 == 10 + instructions.CALLS * len(instructions.cases())
    assert all(call is calls[0] and call() is None for call in calls[: 10 + instructions.CALLS])
    assert calls[10 + instructions.CALLS] is not calls[0] and last is calls[-1]
