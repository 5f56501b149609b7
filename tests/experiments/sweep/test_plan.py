"""From a suite to evaluations and distinct trainings."""

import re
import time

import pytest
from domainshift.errors import SuiteError
from domainshift.sweep.command import main
from domainshift.sweep.plan import chosen
from paper_data import cells, expanded, on_paper, plan_of, table_of
from small_suites import GRID, small, table

FAULTS = {
    "unknown switch": (
        {"tables": {"one": table(switches={"p_zeros": 0.3})}},
        r"table one, arm a: p_zeros: mode random has no such switch",
    ),
    "unknown switch of the defaults": (
        {"defaults": {"p_zeros": 3}},
        r"table one, arm baseline: p_zeros: no method has such a switch",
    ),
    "a value out of range": (
        {"tables": {"one": table(arms={"a": {"mode": "random", "layers": 1, "p_zero": 1}})}},
        r"table one, arm a: p_zero: 1 is not allowed; allowed: 0 <= p_zero < 1",
    ),
    "a seed in an arm": (
        {"tables": {"one": table(switches={"seed": 1})}},
        r"table one, arm a: seed is not for an arm",
    ),
    "an unknown mode": (
        {"tables": {"one": table(switches={"mode": "x"}, arms={"a": {}})}},
        r"table one, arm a: mode: 'x' is not allowed; allowed: baseline \| ",
    ),
    "a layer that is not there": (
        {"tables": {"one": table(arms={"a": {"mode": "da", "layers": [99]}})}},
        r"table one, arm a: layers: there is no conv 99; this model has convs 1 to 20",
    ),
    "a layer of a grid that is not there": (
        {
            "tables": {
                "one": table(arms={}, grid={"layers": [1, "x"]}, name="r{layers}")
                | {"switches": {"mode": "random", "p_zero": 0.5}}
            }
        },
        r"table one, arm rx: layers: there is no module 'x'",
    ),
    "three p_zero for one layer": (
        {
            "tables": {
                "one": table(
                    switches={"p_zero": [0.1, 0.2, 0.3]},
                    arms={"a": {"mode": "random", "layers": 1}},
                )
            }
        },
        r"table one, arm a: p_zero: .* has 3 values for 1 layers; allowed: one ",
    ),
    "a domain that is not there": (
        {"targets": ["clipart"]},
        r"table one, arm baseline: target: 'clipart' is no domain of data set PACS; allowed: cart",
    ),
    "two equal arms of one name": (
        {
            "tables": {
                "one": table(**GRID | {"arms": {"r-0.1": {"p_zero": 0.1}}}, name="r-{p_zero}")
            }
        },
        r"table one, arm r-0.1: two arms of this table have that name",
    ),
    "one value of a grid twice": (
        {"tables": {"one": table(**GRID | {"grid": {"p_zero": [0.1, 0.10]}}, name="r-{p_zero}")}},
        r"table one, arm r-0.1: two arms of this table have that name",
    ),
    "no arms": ({"tables": {"one": table(arms={})}}, r"table one: has no evaluations"),
    "no pair": ({"targets": ["art_painting"]}, r"table one: has no evaluations"),
    "a grid without a name": ({"tables": {"one": table(**GRID)}}, r"'grid' and 'name' are given"),
    "a name without its value": (
        {"tables": {"one": table(**GRID, name="r-{p}")}},
        r"name 'r-\{p\}': 'p' is no switch of the grid",
    ),
    "a name that leaves its folder": (
        {"tables": {"one": table(arms={"../a": {}})}},
        r"'../a' cannot name a folder",
    ),
    "a baseline that is not there": (
        {"tables": {"one": table(baseline="b")}},
        r"table one: baseline: no arm 'b'",
    ),
    "an arm to compare that is not there": (
        {"tables": {"one": table(compare=[["a", "b"]])}},
        r"table one: compare: no arm 'b'",
    ),
    "two arms of one name in a table": (
        {"tables": {"one": table(**GRID, name="r")}},
        r"two evaluations are called r-art_painting-cartoon-s0: table one, arm r and table one, arm "
        r"r; p_zero: \[0.1\] -> \[0.2\]",
    ),
    "two arms of one name in two tables": (
        {"tables": {"one": table(), "two": table(switches={"gradient": "zero"})}},
        r"two evaluations are called a-art_painting-cartoon-s0: table one, arm a and table two, arm "
        r"a; gradient: 'straight_through' -> 'zero'",
    ),
    "two tests of one name in two tables": (
        {"tables": {"one": table(), "two": table(switches={"at_eval": "binarize"})}},
        r"two evaluations are called a-art_painting-cartoon-s0: table one, arm a and table two, arm "
        r"a; at_eval: 'off' -> 'binarize'",
    ),
    "two trainings of one name": (
        {"tables": {"one": table(), "two": table(switches={"lr": 0.5}, targets=["photo"])}},
        r"two trainings are called a-art_painting-s0: table one, arm a and table two, arm a; "
        r"lr: 0.001 -> 0.5",
    ),
}


@pytest.mark.parametrize("changes, message", FAULTS.values(), ids=FAULTS)
def test_faults_are_named_in_one_line(changes, message, tmp_path, capsys):
    out = tmp_path / "out"
    for how in ([], ["--dry-run"]):
        with on_paper():
            assert main([small(tmp_path, **changes), "--out", str(out), *how]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert len(error.splitlines()) == 1 and error.startswith("suite.py: error: ")
        assert not out.exists()


# --- what is trained once ---------------------------------------------------------------------

RANDOM = {"mode": "random", "layers": 1, "p_zero": 0.5}


def test_one_training_serves_every_way_to_test_it(tmp_path):
    tests = {
        "off": {},
        "on": {"at_eval": "on"},
        "source": {"bn_at_test": "source"},
        "mistake": {"test_set": "source-train"},
    }
    plan = expanded(small(
        tmp_path, targets=["cartoon", "photo"], defaults={"holdout": 0.1, "bn_at_test": "trained"},
        tables={"one": table(arms=tests, switches=RANDOM)},
    ))  # fmt: skip
    (job,) = plan.jobs
    assert job.name == "off-art_painting-s0"
    assert [test.name for test in job.tests] == [
        *("cartoon", "art_painting-holdout", "photo"),
        *("cartoon-shaping-on", "art_painting-holdout-shaping-on", "photo-shaping-on"),
        *("cartoon-bn-source", "art_painting-holdout-bn-source", "photo-bn-source"),
        "art_painting-train",
    ]
    assert {(arm, cell.target): cell.test for arm, cell in cells(plan, "one")} == {
        (arm, target): f"{target}{suffix}"
        for arm, suffix in zip(tests, ("", "-shaping-on", "-bn-source", ""), strict=True)
        for target in ("cartoon", "photo")
    }
    assert len(plan.evaluations(plan.jobs)) == 6  # "mistake" is "off", tested once more


def test_adabn_is_the_baselines_training(tmp_path):
    arms = {"adabn": {"mode": "adabn"}, "base": {"mode": "baseline", "bn_at_test": "trained"}}
    plan = expanded(small(tmp_path, tables={"one": table(arms=arms)}))
    (job,) = plan.jobs
    assert job.name == "adabn-art_painting-s0"  # of the arm that asks first
    assert [cell.test for _, cell in cells(plan, "one")] == ["cartoon-bn-target", "cartoon"]


def test_a_method_that_learns_from_targets_trains_for_each(tmp_path):
    arms = {"da": {"mode": "da", "layers": 4}, "base": {"mode": "baseline"}}
    path = small(tmp_path, targets=["cartoon", "photo"], tables={"one": table(arms=arms)})
    assert [job.name for job in expanded(path).jobs] == [
        "da-art_painting-cartoon-s0",
        "da-art_painting-photo-s0",
        "base-art_painting-s0",
    ]


def test_a_mode_has_one_meaning_by_all_its_names(tmp_path):
    arms = {"a": {"mode": "da", "layers": 4}, "b": {"mode": "target", "layers": 4}}
    plan = expanded(small(tmp_path, tables={"one": table(arms=arms)}))
    assert [job.name for job in plan.jobs] == ["a-art_painting-cartoon-s0"]


def test_an_evaluation_of_two_tables_is_made_once(tmp_path):
    again = table(arms={"a": {}, "b": {}}, switches=table()["arms"]["a"])
    plan = expanded(small(tmp_path, tables={"one": table(), "two": again}))
    assert [job.name for job in plan.jobs] == ["a-art_painting-s0"]
    places = [
        (cell.training, cell.test) for name in ("one", "two") for _, cell in cells(plan, name)
    ]
    assert places == [("a-art_painting-s0", "cartoon-bn-source")] * 3
    assert len(plan.evaluations(plan.jobs)) == 1


@pytest.mark.parametrize(
    "first, second, both",
    [("last", "each", "each"), ("each", "last", "each"), ("last", "2", "2"), ("2", "3", "each")],
)
def test_arms_that_share_a_training_get_every_epoch_they_ask_for(first, second, both, tmp_path):
    arms = {"a": RANDOM | {"evaluate": first}, "b": RANDOM | {"evaluate": second, "at_eval": "on"}}
    (job,) = expanded(small(tmp_path, tables={"one": table(arms=arms)})).jobs
    assert job.values["evaluate"] == job.setup.config.evaluate == both


def test_seeds_come_first(tmp_path):
    tables = {"one": table(), "two": {"title": "T", "arms": {"b": {"mode": "baseline"}}}}
    plan = expanded(small(tmp_path, seeds=[0, 3, 1], tables=tables))
    assert [job.name for job in plan.jobs] == [
        f"{arm}-art_painting-s{seed}" for seed in (0, 1, 3) for arm in "ab"
    ]
    assert [job.values["seed"] for job in plan.jobs] == [0, 0, 1, 1, 3, 3]


# --- values -----------------------------------------------------------------------------------


def test_later_values_win_and_null_is_none(tmp_path):
    path = small(
        tmp_path,
        defaults={"epochs": 2, "batch_size": 4, "lr": 0.5, "momentum": 0.1},
        tables={
            "one": table(
                switches={"mode": "baseline", "batch-size": 6, "lr": 0.25},
                arms={"a": {"lr": 0.125, "momentum": None}},
            )
        },
        profiles={"full": {"defaults": {"epochs": 3}, "seeds": [7], "targets": ["photo"]}},
    )
    (job,) = expanded(path, gamma="0.75").jobs
    config = job.setup.config
    assert job.name == "a-art_painting-s7"
    assert (config.epochs, config.batch_size, config.lr) == (3, 6, 0.125)
    assert (config.momentum, config.gamma, config.seed) == (0.9, 0.75, 7)


def test_switches_of_a_method_reach_the_arms_that_have_them(tmp_path):
    arms = {"a": RANDOM, "b": {"mode": "baseline"}}
    path = small(tmp_path, defaults={"gradient": "zero"}, tables={"one": table(arms=arms)})
    a, b = expanded(path, at_eval="on").jobs
    assert (a.values["gradient"], a.tests[0].at_eval) == ("zero", "on")
    assert "gradient" not in b.values and b.tests[0].at_eval == "off"


def test_precision_is_settled_for_where_trainings_will_be(tmp_path, monkeypatch):
    path = small(tmp_path)
    for has_bfloat16, amp in ((True, "bfloat16"), (False, "off")):
        monkeypatch.setattr("domainshift.config.cpu_has_bfloat16", lambda has=has_bfloat16: has)
        (job,) = expanded(path).jobs
        assert job.setup.config.amp == job.values["amp"] == amp
        (job,) = expanded(path, device="cuda").jobs  # no GPU is needed to plan for one
        assert job.setup.config.amp == job.values["amp"] == "float16"
        assert job.values["device"] == "cuda"
        (job,) = expanded(path, device="cuda", amp="off").jobs
        assert job.setup.config.amp == job.values["amp"] == "off"


# --- a part of it -----------------------------------------------------------------------------


def test_a_table_comes_with_the_baseline_of_another():
    plan = plan_of("report-b")
    one = table_of(plan, "p-zero-conv1")
    assert one.baseline not in [arm.name for arm in one.arms]
    modes = [job.setup.config.mode for job in chosen(plan, "p-zero-conv1")]
    evaluations = sum(len(arm.cells) for arm in one.arms)
    assert modes.count("random") == evaluations == 50 and modes.count("baseline") == 5


def test_a_table_comes_with_the_arms_it_is_compared_with(tmp_path):
    other = {"title": "O", "arms": {"b": {"mode": "baseline"}, "c": {"mode": "dann"}}}
    plan = expanded(small(tmp_path, tables={"one": table(compare=[["a", "b"]]), "two": other}))
    assert {job.name[0] for job in chosen(plan, "one")} == {"a", "b"}


@pytest.mark.parametrize(
    "pattern, trainings", [("adabn", 20), ("adabn-sketch-*", 5), ("baseline-photo-s[01]", 2)]
)
def test_arms_evaluations_and_trainings_can_be_chosen(pattern, trainings):
    assert len(chosen(plan_of("study"), pattern)) == trainings
    with pytest.raises(SuiteError, match="no table, arm or training matches 'x"):
        chosen(plan_of("study"), "x*")


# --- speed ------------------------------------------------------------------------------------


def test_1500_evaluations_expand_in_seconds(tmp_path):
    grid = {"p_zero": [i / 100 for i in range(25)]}
    sweep = table(**GRID | {"grid": grid, "name": "r{p_zero}"})
    domains = ["art_painting", "cartoon", "photo", "sketch"]
    path = small(tmp_path, sources=domains, targets=domains, seeds=[0, 1, 2, 3, 4],
                 tables={"one": sweep})  # fmt: skip
    start = time.process_time()
    plan = expanded(path)
    assert len(plan.evaluations(plan.jobs)) == 25 * 12 * 5 == 1500
    assert time.process_time() - start < 5
