"""benchmarks/gpu.py: its byte model, timing, goals and result file, as far as they can be tested without a GPU."""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_speed
import gpu_tests
import pytest
import torch
from gpu_speed import CASES, CONTENDERS, Case
from tensors import DTYPES

ROOT = Path(__file__).parents[2]


# ---- the byte model and the statistics ----


def test_maps_have_at_least_the_size_of_their_case():
    for case in CASES:
        item = getattr(torch, case.dtype).itemsize
        n = torch.Size(gpu_speed.shape_of(case)).numel()
        assert case.mib <= n * item / 2**20 < case.mib + 25 and gpu_speed.shape_of(case)[0] % 8 == 0


def test_byte_model_by_hand():
    # A float32 map has 802,816 elements. 64 MiB are 24 maps with 19,267,584 elements.
    n = 24 * 64 * 112 * 112
    assert gpu_speed.moved_bytes(Case("random", "float32", "forward", 64)) == 8 * n
    assert gpu_speed.moved_bytes(Case("random", "float32", "in place", 64)) == 8 * n
    assert gpu_speed.moved_bytes(Case("target", "float32", "backward", 64)) == 8 * n + n // 8
    both = gpu_speed.moved_bytes(Case("target", "bfloat16", "forward+backward", 64))
    assert both == 2 * (4 * 2 * n + 2 * n // 8)


def test_inputs_rotate_through_more_than_the_cache():
    assert gpu_speed.sets_to_rotate(set_bytes=128, cache_bytes=50) == 2
    assert gpu_speed.sets_to_rotate(set_bytes=10, cache_bytes=50) == 11


def test_spread_by_hand():
    assert gpu_speed.spread([float(k) for k in range(11)]) == {"median": 5, "p20": 2, "p80": 8}


# ---- time ----


class ScriptedClock:
    """A clock of a simulated device. Each turn names its own duration, and `delay` puts the device to sleep."""

    def __init__(self, enqueuing_ms: float):
        self.now, self.enqueuing_ms, self.waits = 0.0, enqueuing_ms, []

    def mark(self):
        return self.now

    def delay(self, milliseconds):
        self.waits.append(milliseconds)

    def passed(self, mark):
        return self.waits[-1] < self.enqueuing_ms

    def milliseconds(self, start, end):
        return end - start


def test_contenders_take_turns_and_late_rounds_are_discarded():
    clock, order = ScriptedClock(enqueuing_ms=5.0), []

    def turn(name, milliseconds):
        def prepare():
            order.append(f"prepare {name}")

            def call():
                order.append(name)
                clock.now += milliseconds + len(clock.waits)

            return call

        return prepare

    times = gpu_speed.time_in_turn({"a": turn("a", 10), "b": turn("b", 20)}, clock, rounds=3)
    # In rounds 1 and 2 the device woke after 2 and 4 ms, before the host was done. 8 ms were enough.
    assert clock.waits == [2, 4, 8, 8, 8]
    assert times == {"a": [13, 14, 15], "b": [23, 24, 25]}
    assert order[:4] == ["prepare a", "prepare b", "a", "b"]


def test_a_host_that_is_too_slow_is_an_error():
    with pytest.raises(RuntimeError, match="half a second"):
        gpu_speed.time_in_turn({"a": lambda: lambda: None}, ScriptedClock(1e9), rounds=1)


def test_host_times_are_of_one_call():
    waits = []
    times = gpu_speed.host_times(
        {"a": lambda: time.sleep(1e-3)}, lambda: waits.append(0), calls_each=2, rounds=3
    )
    assert len(times["a"]) == 3 and all(1000 <= us < 50_000 for us in times["a"])
    # One wait before each of three warm-up rounds and three measured rounds, and one at the end.
    assert len(waits) == 3 + 3 + 1


# ---- contenders ----


@pytest.mark.parametrize("mask", gpu_speed.MASKS)
@pytest.mark.parametrize("direction", gpu_speed.DIRECTIONS)
def test_every_contender_does_its_direction(monkeypatch, mask, direction):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    gpu_speed._compiled.cache_clear()
    case = Case(mask, "float32", direction, 64)
    served = [name for name, contender in CONTENDERS.items() if contender.serves(case)]
    assert {"fastshape", "copy", "Triton kernels"} <= set(served)
    x, grad, target = torch.randn(3, 4, 5, 5).abs(), torch.randn(4, 5, 5), torch.randn(4, 5, 5)
    recorded = gpu_speed.fastshape.BitMask.from_tensor(target) if mask == "target" else None
    for name in served:
        if name == "Triton kernels":  # needs a GPU
            continue
        inputs = gpu_speed.Inputs(x[0].clone(), grad, recorded)
        result = CONTENDERS[name].prepare(direction, inputs)()
        if name == "copy":
            continue
        if direction == "in place":
            assert result.data_ptr() == inputs.x.data_ptr()
            assert not torch.equal(inputs.x, x[0])
        elif direction == "forward":
            assert result.data_ptr() != inputs.x.data_ptr() and torch.equal(inputs.x, x[0])
        else:
            (result,) = result
            nonzero = result != 0
            scale = 1 / gpu_speed.P_ZERO if name == "F.dropout" else 1
            assert (
                torch.equal(result[nonzero], scale * grad[nonzero])
                and 0 < nonzero.sum() < grad.numel()
            )
            if mask == "target":
                assert torch.equal(nonzero, target > 0)
    gpu_speed._compiled.cache_clear()


def test_a_case_gives_one_row_per_contender_or_its_error(monkeypatch):
    monkeypatch.setattr(gpu_speed, "MAP", (2, 8, 8))

    def fails(direction, inputs):
        raise ValueError("no such thing")

    contenders = {name: CONTENDERS[name] for name in ("fastshape", "copy", "F.dropout")}
    contenders["broken"] = gpu_speed.Contender(fails)
    contenders["absent"] = gpu_speed.Contender(fails, missing=lambda: "not installed")
    contenders = {name: dataclasses.replace(c, sizes=(1,)) for name, c in contenders.items()}
    monkeypatch.setattr(gpu_speed, "CONTENDERS", contenders)
    clock = ScriptedClock(enqueuing_ms=0)
    clock.milliseconds = lambda start, end: 2.0
    case = Case("random", "float16", "forward", 1)
    records = list(gpu_speed.run_case(case, clock, "cpu", 1000, datasheet=1e9, rounds=4))
    errors = [record for record in records if record["kind"] == "error"]
    assert ["no such thing" in e["error"] for e in errors] == [True, False]
    assert "not installed" in errors[1]["error"]
    rows = {record["contender"]: record for record in records if record["kind"] == "speed"}
    assert list(rows) == ["fastshape", "copy", "F.dropout"]
    row = rows["fastshape"]
    assert row["shape"] == (4096, 2, 8, 8) and row["bytes"] == 4 * 2**19 and row["rounds"] == 4
    assert row["GB_per_s"] == pytest.approx(4 * 2**19 / 2e-3 / 1e9)
    assert row["share_of_datasheet"] == pytest.approx(row["GB_per_s"])  # of 1 GB/s
    assert row["share_of_copy"] == row["fastshape_is_faster"] == 1
    assert row["ms"] == {"median": 2, "p20": 2, "p80": 2}


def test_rates_and_ratios_by_hand():
    case = Case("target", "float32", "forward", 64)
    n = 24 * 64 * 112 * 112
    times = {"fastshape": [1.0, 2.0], "copy": [1.0, 1.0], "reference, eager": [3.0, 8.0]}
    ours, copy, eager = gpu_speed.speed_rows(case, times, datasheet=None)
    assert ours["GB_per_s"] == pytest.approx(8.125 * n / 1.5e-3 / 1e9)
    assert copy["GB_per_s"] == pytest.approx(8 * n / 1e-3 / 1e9) and copy["share_of_copy"] == 1
    assert ours["share_of_copy"] == pytest.approx(8.125 / 1.5 / 8)
    assert ours["share_of_datasheet"] is None
    assert eager["fastshape_is_faster"] == 3.5  # the median of 3 and 4, not 5.5 / 1.5


def test_saved_bytes(monkeypatch):
    monkeypatch.setattr(gpu_speed, "MAP", (2, 8, 8))
    rows = {(row["mask"], row["contender"]): row for row in gpu_speed.saved_rows("cpu")}
    n = 32 * 2 * 8 * 8
    assert rows["random", "fastshape"]["bytes"] == 16
    assert rows["target", "fastshape"]["bytes"] == n // 8
    assert rows["target", "fastshape"]["of_mask"] == 1
    assert rows["random", "reference, eager"]["bytes"] == n  # a bool mask


def test_small_calls_and_their_rows():
    for backward in (False, True):
        calls = gpu_speed.small_calls("cpu", backward)
        times = gpu_speed.host_times(calls, lambda: None, calls_each=1, rounds=2)
        rows = {row["contender"]: row for row in gpu_speed.overhead_rows("eager", times)}
        assert rows["F.dropout"]["of_dropout"] == 1
        assert {"fastshape, random", "fastshape, target"} < set(rows)


# ---- BatchNorm, and a training step ----


def test_batch_norm_is_timed_at_these_maps():
    cases = gpu_speed.BATCH_NORM_CASES
    shapes = {case.shape for case in cases}
    assert shapes == {(32, 64, 112, 112), (32, 256, 14, 14), (32, 512, 7, 7)}
    assert {case.dtype for case in cases} == {"float32", "float16"} and len(set(cases)) == 12


def test_bytes_of_batch_norm_by_hand():
    case = gpu_speed.BatchNormCase((2, 8, 3, 5), "float16", "channels_last")
    assert gpu_speed.batch_norm_bytes(case, "forward") == 2 * 2 * 240 + 3 * 30
    assert gpu_speed.batch_norm_bytes(case, "backward") == 3 * 2 * 240 + 2 * 30


@pytest.mark.parametrize("dtype", ("float32", "float16"))
@pytest.mark.parametrize("memory_format", gpu_speed.MEMORY_FORMATS)
def test_a_batch_norm_case_gives_a_row_per_direction_and_contender(
    monkeypatch, dtype, memory_format
):
    def absent(channels):
        raise OSError("no compiler")

    # The compiled contender is its uncompiled module here.
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    contenders = gpu_speed.BATCH_NORM_CONTENDERS | {"absent": absent}
    monkeypatch.setattr(gpu_speed, "BATCH_NORM_CONTENDERS", contenders)
    clock = ScriptedClock(enqueuing_ms=0)
    clock.milliseconds = lambda start, end: 2.0
    case = gpu_speed.BatchNormCase((2, 8, 3, 5), dtype, memory_format)
    error, *rows = gpu_speed.run_batch_norm_case(case, clock, "cpu", 1000, rounds=3)
    assert error["kind"] == "error" and "no compiler" in error["error"]
    assert [(row["direction"], row["contender"]) for row in rows] == [
        (direction, name) for direction in ("forward", "backward") for name in contenders if name != "absent"
    ]  # fmt: skip
    for row in rows:
        assert row["kind"] == "batch norm" and row["fastshape_is_faster"] == 1
        assert row["ms"]["median"] == 2 and row["memory_format"] == memory_format
    size = gpu_speed.batch_norm_bytes(case, "forward")
    assert rows[0]["bytes"] == size and rows[0]["GB_per_s"] == pytest.approx(size / 2e-3 / 1e9)
    assert rows[1]["bytes"] is rows[1]["GB_per_s"] is None


@pytest.mark.parametrize("memory_format", gpu_speed.MEMORY_FORMATS)
def test_batch_norm_contenders_differentiate_their_own_inputs(memory_format):
    case = gpu_speed.BatchNormCase((2, 8, 3, 5), "float32", memory_format)
    for name in ("fastshape", "unshaped"):
        module = gpu_speed.BATCH_NORM_CONTENDERS[name](8)
        x, grad = gpu_speed.batch_norm_inputs(case, "cpu")
        y = gpu_speed.prepare_batch_norm("forward", module, x, grad)()
        assert y.requires_grad and (y >= 0).all() and (y == 0).any()
        dx, dweight, dbias = gpu_speed.prepare_batch_norm("backward", module, x, grad)()
        assert dx.shape == x.shape and dx.stride() == x.stride()
        assert dweight.shape == dbias.shape == (8,)


def test_training_steps(monkeypatch):
    pytest.importorskip("torchvision")

    def absent(model):
        raise OSError("no compiler")

    monkeypatch.setattr(torch, "compile", absent)
    clock = ScriptedClock(enqueuing_ms=0)
    clock.milliseconds = lambda start, end: 3.0
    *rows, last = sorted(
        gpu_speed.step_rows("channels_last", clock, "cpu", batch=2, side=32, rounds=2, warm_up=0),
        key=lambda row: row["kind"] == "error",
    )
    assert [row["contender"] for row in rows] == ["replace", "hooks", "unshaped"]
    assert all(row["kind"] == "step" and row["ms"]["median"] == 3 for row in rows)
    assert "no compiler" in last["error"] and "unshaped, torch.compile" in last["what"]


def test_batch_norm_and_steps_come_before_the_second_size_of_maps():
    names = list(gpu_speed.tasks_in_order({"saved": print}, print, print, print))
    assert names[0] == "saved" and len(names) == len(set(names)) == 1 + 12 + 4 + len(CASES)
    large = min(k for k, name in enumerate(names) if "mib=256" in name)
    before = [name for name in names[:large] if name.startswith(("training step", "BatchNorm"))]
    assert len(before) == 12 + 2
    assert all(name.startswith("training step, compiled") for name in names[large + 24 :])


def test_known_devices_have_the_bandwidth_of_their_datasheet():
    assert gpu_speed.DATASHEET["NVIDIA H100 80GB HBM3"] == 3.35e12
    assert gpu_speed.DATASHEET["NVIDIA H200"] == 4.8e12


# ---- goals ----


def test_goals_of_batch_norm_and_steps():
    case = gpu_speed.BATCH_NORM_CASES[0]
    for ratio, reached in ((1.0, False), (1.01, True)):
        record = {
            "kind": "batch norm", **case.fields(), "direction": "backward", "contender": "unshaped",
            "fastshape_is_faster": ratio,
        }  # fmt: skip
        what = (
            "BatchNorm backward, (32, 64, 112, 112), float32, contiguous_format: against unshaped"
        )
        for row in (record, json.loads(json.dumps(record))):
            assert goal_named(what, row)["reached"] is reached
        record = {"kind": "step", "memory_format": "channels_last", "contender": "unshaped"}
        what = "training step, channels_last: against unshaped"
        assert goal_named(what, record | {"fastshape_is_faster": ratio})["reached"] is reached


def speed_record(case: Case, contender: str, **fields) -> dict:
    measures = {"share_of_datasheet": None, "share_of_copy": None, "fastshape_is_faster": 1.0}
    return {"kind": "speed", **vars(case), "contender": contender} | measures | fields


def goal_named(what: str, *records: dict) -> dict:
    (goal,) = [g for g in gpu_speed.goals(list(records)) if g["what"] == what]
    return goal


def test_without_records_no_goal_is_measured():
    goals = gpu_speed.goals([])
    assert len({goal["what"] for goal in goals}) == len(goals) > 60
    assert all(goal["measured"] is goal["reached"] is None for goal in goals)


@pytest.mark.parametrize(
    ("datasheet", "copy", "reached"),
    ((0.85, 0.5, True), (None, 0.92, True), (0.849, 0.919, False), (None, 0.919, False)),
)
def test_memory_speed_is_reached_by_either_share(datasheet, copy, reached):
    case = Case("target", "float16", "backward", 64)
    record = speed_record(case, "fastshape", share_of_datasheet=datasheet, share_of_copy=copy)
    goal = goal_named("backward, target, float16, 64 MiB: memory speed", record)
    assert goal["reached"] is reached
    assert goal["measured"] == {"share_of_datasheet": datasheet, "share_of_copy": copy}


@pytest.mark.parametrize(
    ("direction", "contender", "level", "more"),
    (
        ("forward", "reference, torch.compile", True, True),  # equal or faster
        ("forward+backward", "reference, torch.compile", False, True),  # faster
        ("forward", "F.dropout", False, True),
        ("forward", "reference, eager", False, False),  # three times as fast
    ),
)
def test_goals_against_each_contender(direction, contender, level, more):
    case = Case("random", "float32", direction, 64)
    what = f"{direction}, random, float32, 64 MiB: against {contender}"
    for ratio, reached in ((0.99, False), (1.0, level), (1.01, more), (3.0, True)):
        record = speed_record(case, contender, fastshape_is_faster=ratio)
        assert goal_named(what, record)["reached"] is reached


def test_goals_of_memory_and_launches():
    for size, reached in ((16, True), (17, False)):
        record = {"kind": "saved", "mask": "random", "contender": "fastshape", "bytes": size}
        assert goal_named("saved for backward, random", record)["reached"] is reached
    for where, ratio, reached in (
        ("eager", 1.5, True), ("eager", 1.51, False), ("graph", 1.05, True), ("graph", 1.06, False),
    ):  # fmt: skip
        record = {
            "kind": "overhead", "where": where, "contender": "fastshape, target", "of_dropout": ratio,
        }  # fmt: skip
        assert goal_named(f"launch, {where}: fastshape, target", record)["reached"] is reached


# ---- tests and their records ----


def test_outcomes_of_tests_become_records(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_left(): pytest.skip('no such GPU')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no fixture')\n"
        "def test_set_up(broken): pass\n"
    )
    (tmp_path / "test_unreadable.py").write_text("import no_such_module\n")
    records = []
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_tests.py"), "RECORDS", str(tmp_path)]
    outcome = gpu.run([*command, "--continue-on-collection-errors"], 100, records.append)
    assert outcome["state"] == "done", outcome["output"]  # failures are in the records
    outcomes = {record["name"].split("::")[-1]: record for record in records}
    names = {name: record["outcome"] for name, record in outcomes.items()}
    unreadable = next(name for name in names if "unreadable" in name)
    assert names == {
        "test_good": "passed", "test_bad": "failed", "test_left": "skipped", "test_set_up": "error",
        unreadable: "error",
    }  # fmt: skip
    assert "one is not two" in outcomes["test_bad"]["message"]
    assert "no such GPU" in outcomes["test_left"]["message"]
    assert "no fixture" in outcomes["test_set_up"]["message"]
    counts = gpu.summary(records)
    assert counts == {"passed": 1, "failed": 1, "error": 2, "skipped": 1, "sanitizer_errors": 0}


def test_files_with_gpu_tests_are_selected():
    names = {path.name for path in gpu_tests.files()}
    assert {"test_cuda.py", "test_triton.py", "test_waits.py"} <= names
    assert "test_attach.py" not in names


@pytest.mark.parametrize(
    ("counts", "state", "status"),
    (
        ({"passed": 3}, "done", 0),
        ({"passed": 3}, "cut", 1),
        ({"passed": 3, "failed": 1}, "done", 1),
        ({"passed": 3, "error": 1}, "done", 1),
        ({"passed": 3, "sanitizer_errors": 1}, "done", 1),
        ({"skipped": 3}, "done", 1),  # no test ran
    ),
)
def test_exit_status(counts, state, status):
    none = {"passed": 0, "failed": 0, "error": 0, "skipped": 0, "sanitizer_errors": 0}
    parts = {"tests": {"state": state}, "sanitizer": {"state": "skipped"}}
    assert gpu.exit_status(none | counts, parts) == status


@pytest.mark.parametrize("state", (None, "cut", "failed", "done", "skipped"))
def test_exit_status_of_the_sanitizer(state):
    counts = {"passed": 3, "failed": 0, "error": 0, "skipped": 0, "sanitizer_errors": 0}
    parts = {"tests": {"state": "done"}} | ({"sanitizer": {"state": state}} if state else {})
    assert gpu.exit_status(counts, parts) == (0 if state in ("done", "skipped") else 1)


@pytest.mark.parametrize(("version", "tools"), (("65.5.0", 1), ("77.0.1", 0), ("84.2.1", 0)))
def test_a_build_names_a_setuptools_that_is_too_old(monkeypatch, version, tools):
    monkeypatch.setattr(gpu, "_version", lambda package: version)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    assert gpu.missing_tools() == [f"setuptools>=77, not {version}"] * tools
    assert f'"setuptools>={gpu.OLDEST_SETUPTOOLS}"' in (ROOT / "pyproject.toml").read_text()


# ---- compute-sanitizer's log ----

OURS = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void fastshape::cuda::<unnamed>::shape_kernel<fastshape::Float16, ...>(const void *)+0x120
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Invalid __global__ write of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4, ...>(int)+0x120
=========
========= ERROR SUMMARY: 2 errors
"""


def test_sanitizer_log():
    result = gpu.read_sanitizer(OURS)
    assert (result["errors"], result["errors_in_fastshape"]) == (2, 1)
    assert "shape_kernel" in result["reports"][0] and "vectorized" not in result["reports"][0]
    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu.read_sanitizer(clean) == {"errors": 0, "errors_in_fastshape": 0, "reports": []}
    races = "========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n"
    assert gpu.read_sanitizer(races)["errors"] == 3
    stopped = gpu.read_sanitizer("========= Error: Device not supported\n")
    assert (stopped["errors"], stopped["errors_in_fastshape"]) == (None, 0)
    assert "Device not supported" in stopped["reports"][0]


def test_reports_before_the_end_of_a_log_count():
    cut = gpu.read_sanitizer(OURS[: OURS.index("========= ERROR SUMMARY")])
    assert (cut["errors"], cut["errors_in_fastshape"]) == (None, 1)
    assert "shape_kernel" in cut["reports"][0]


TESTED = "{'kind': 'test', 'outcome': 'passed'}"


@pytest.mark.parametrize(
    ("log", "then", "state", "errors", "status"),
    (
        ("========= ERROR SUMMARY: 0 errors\n", f"record({TESTED})", "done", 0, 0),
        (OURS, f"record({TESTED})", "done", 1, 1),
        (OURS[:300], f"record({TESTED}); time.sleep(60)", "cut", 1, 1),
        ("", f"record({TESTED}); time.sleep(60)", "cut", 0, 1),
        ("========= Error: Device not supported\n", f"record({TESTED})", "failed", 0, 1),
        ("========= ERROR SUMMARY: 0 errors\n", "", "failed", 0, 1),  # no test ran
        ("========= ERROR SUMMARY: 0 errors\n", "sys.exit(3)", "failed", 0, 1),
    ),
)  # fmt: skip
def test_sanitizer_runs(monkeypatch, tmp_path, log, then, state, errors, status):
    """A script stands in for compute-sanitizer."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\n"
        "import json, sys, time\n"
        "def record(r): open(sys.argv[7], 'a').write(json.dumps(r) + '\\n')\n"
        f"open(sys.argv[4], 'w').write({log!r})\n{then}\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "CHECKS", ("memcheck",))
    result = result_in(tmp_path)
    result.add({"kind": "test", "outcome": "passed"})
    outcome = gpu.sanitize(3 if state == "cut" else 60, result.add)
    assert outcome["state"] == state and outcome["reason"] == f"memcheck {state}"
    assert gpu.summary(result.records)["sanitizer_errors"] == errors
    parts = {"tests": {"state": "done"}, "sanitizer": outcome}
    assert gpu.exit_status(gpu.summary(result.records), parts) == status


def test_tests_under_the_sanitizer_cover_every_dtype_format_and_mask():
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", *gpu.SANITIZED]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    names = re.findall(r"::(test_\w+)\[(.*)\]", process.stdout)
    assert 100 < len(names) < 200, process.stdout
    selected = {(name, frozenset(values.split("-"))) for name, values in names}
    for dtype, memory_format in itertools.product(DTYPES, ("contiguous_format", "channels_last")):
        about = (str(dtype), f"torch.{memory_format}")
        for mask in ("random", "bits", "none"):
            assert ("test_forward", frozenset((*about, mask, "aligned"))) in selected
            assert ("test_backward", frozenset((*about, mask))) in selected
    ours = {name for name, _ in names}
    assert ours == {
        "test_ops_equal_the_reference", "test_pack_and_unpack_equal_the_reference",
        "test_pack_random_equals_the_reference", "test_pack_top_equals_the_reference", "test_forward", "test_backward",
    }  # fmt: skip


# ---- the command: budget, time limits, the file ----


def result_in(folder: Path) -> gpu.Result:
    return gpu.Result(folder / "new" / "here.json", {"device": "none"}, lambda records: [])


def writes(*records: dict, then: str = "") -> list[str]:
    """The command of a process that appends these records to its file."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    code = f"import sys, time; open(sys.argv[1], 'a').write({lines!r}); print('output'); {then}"
    return [sys.executable, "-c", code, "RECORDS"]


def test_a_process_over_its_limit_is_killed_and_its_records_are_kept(tmp_path):
    records, pid = [], tmp_path / "pid"
    # The children of the process must end, too.
    child = "import subprocess; p = subprocess.Popen(['sleep', '60']); "
    child += f"open({str(pid)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    start = time.monotonic()
    outcome = gpu.run(writes({"kind": "test"}, {"kind": "speed"}, then=child), 3, records.append)
    assert time.monotonic() - start < 50
    assert outcome["state"] == "cut" and "output" in outcome["output"]
    assert records == [{"kind": "test"}, {"kind": "speed"}]
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().rsplit(")")[1].split()[0] == "Z"


def test_the_output_of_a_process_that_fails_is_kept():
    outcome = gpu.run(writes(then="sys.exit(3)"), 30, print)
    assert (outcome["state"], outcome["exit"]) == ("failed", 3) and "output" in outcome["output"]


def test_later_parts_are_cut_first_and_the_file_says_so(tmp_path):
    result = result_in(tmp_path)
    limits = []

    def part(seconds, **outcome):
        def work(limit, add):
            limits.append(limit)
            add({"kind": "speed", "n": len(limits)})
            # The file has all records so far.
            written = json.loads(result.path.read_text())
            assert written["speed"][-1] == {"n": len(limits)}
            time.sleep(seconds)
            return {"state": "done", **outcome}

        return work

    def fails(limit, add):
        raise OSError("no such tool")

    parts = {
        "first": (0.5, part(0.6, reason="took long")),
        "second": (0.5, fails),
        "third": (1, part(0.6)),
        "fourth": (1, part(0)),
    }
    gpu.run_parts(result, 1.0, parts)
    written = json.loads(result.path.read_text())
    assert limits[0] == 0.5 and 0.2 < limits[1] <= 0.4
    states = {name: outcome["state"] for name, outcome in written["parts"].items()}
    assert states == {"first": "done", "second": "failed", "third": "done", "fourth": "cut"}
    assert written["parts"]["fourth"]["reason"] == "the budget of 1 s was used up"
    assert "no such tool" in written["parts"]["second"]["reason"]
    assert written["parts"]["first"]["limit_s"] == 0.5
    assert [p.name for p in result.path.parent.iterdir()] == ["here.json"]


def test_shares_leave_time_for_the_last_part():
    shares = [share for share, _ in gpu.PARTS.values()]
    assert sum(shares[:-1]) < 1 and shares[-1] == 1


@pytest.mark.parametrize("how", (signal.SIGTERM, signal.SIGKILL))
def test_a_kill_loses_no_record(tmp_path, how):
    command = writes({"kind": "test", "outcome": "passed"}, then="time.sleep(20)")
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu, signal
from pathlib import Path
gpu.end_children_on_sigterm()
result = gpu.Result(Path({str(tmp_path / "r.json")!r}), {{}}, lambda records: [])
gpu.run_parts(result, 100, {{"tests": (1, lambda limit, add: gpu.run({command!r}, limit, add))}})
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "r.json").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(how)
        assert process.wait(timeout=15) in (143, -signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert json.loads((tmp_path / "r.json").read_text())["summary"]["passed"] == 1


def test_without_a_gpu_it_says_so_and_exits_2():
    process = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.count("\n") == 1 and "no CUDA device is visible" in process.stderr
