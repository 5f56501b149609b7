"""The rules of published claims: how they are read, and what decides them."""

import pytest
from domainshift.errors import SuiteError
from domainshift.records.claims import parsed
from domainshift.report.claims import Outcome, claims_of, unsteadiness
from domainshift.report.study import read_study
from domainshift.sweep.plan import check_arms
from domainshift.sweep.schema import Suite
from made_records import write_suite

SUITE = """
title: claims
defaults: {preset: course-template, epochs: 12, evaluate: each}
sources: [art_painting]
targets: [cartoon, sketch, photo]
seeds: [0, 1, 2, 3, 4]
margin: 3.0
claims: {one: %s}
tables:
  all:
    title: all
    baseline: baseline
    arms:
      baseline: {mode: baseline}
      high: {mode: random, layers: 1, p_zero: 0.1}
      alike: {mode: random, layers: 1, p_zero: 0.2}
      low: {mode: random, layers: 1, p_zero: 0.3}
profiles: {full: {}}
"""
GAINS = {"baseline": 0, 0.1: 8, 0.2: 0.2, 0.3: -8}
NOISE = (0.3, -0.2, 0.5, -0.4, 0.1)


def accuracy(config, test, share):
    """`high` is 8 above the baseline on cartoon, 12 on sketch, 4 on photo, and swings while training."""
    arm = config.options.p_zero[0] if config.mode == "random" else "baseline"
    base = {"cartoon": 50, "sketch": 30, "photo": 70}[test.domain]
    factor = {"cartoon": 1, "sketch": 1.5, "photo": 0.5}[test.domain]
    swing = 5 * (-1) ** round(12 * share) if arm == 0.1 and share < 1 else 0
    place = (config.seed + round(10 * arm if arm != "baseline" else 5)) % 5
    return base + factor * GAINS[arm] + NOISE[place] + swing


def outcome(tmp_path, claim):
    folder = write_suite(tmp_path / "s", SUITE % claim, accuracy)
    (one,) = claims_of(read_study(folder))
    return one


# --- how rules are read -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a > b", [("a > b", {"a": 1, "b": -1}, ">")]),
        ("a+b-1 = c", [("a+b-1 = c", {"a+b-1": 1, "c": -1}, "=")]),  # + and - belong to names
        ("a - b < c - d", [("a - b < c - d", {"a": 1, "b": -1, "c": -1, "d": 1}, "<")]),
        ("a - x > b - x", [("a - x > b - x", {"a": 1, "b": -1}, ">")]),  # x is no part of it
        (
            "a, b > c, d + e",
            [
                ("a > c", {"a": 1, "c": -1}, ">"),
                ("a > d + e", {"a": 1, "d": -1, "e": -1}, ">"),
                ("b > c", {"b": 1, "c": -1}, ">"),
                ("b > d + e", {"b": 1, "d": -1, "e": -1}, ">"),
            ],
        ),
    ],
)
def test_rules(text, expected):
    assert parsed(text) == expected


@pytest.mark.parametrize(
    "text", ["", "a", "a > b > c", "a > ", "> b", "a b > c", "a - > c", "a + + b > c"]
)
def test_what_is_no_rule(text):
    with pytest.raises(ValueError, match="allowed: ARM"):
        parsed(text)


# --- what decides them ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "claim, expected",
    [
        ("{says: x, rules: [high > baseline]}", Outcome.HOLDS),
        ("{says: x, rules: [high < baseline]}", Outcome.CONTRADICTED),
        ("{says: x, rules: [high > baseline, low > baseline]}", Outcome.CONTRADICTED),
        ("{says: x, rules: [high > baseline, alike > baseline]}", Outcome.UNDECIDED),
        ("{says: x, rules: [alike = baseline]}", Outcome.HOLDS),
        ("{says: x, rules: [alike = baseline], margin: 0.01}", Outcome.UNDECIDED),
        ("{says: x, rules: [high = baseline]}", Outcome.CONTRADICTED),
        ("{says: x, rules: [high - baseline > baseline - low]}", Outcome.UNDECIDED),  # both 8
        ("{says: x, rules: [high - baseline > low - baseline]}", Outcome.HOLDS),
        ("{says: x, rules: ['high > baseline, alike, low'], targets: [sketch]}", Outcome.HOLDS),
        ("{says: x, figure: unsteadiness, rules: [high > baseline]}", Outcome.HOLDS),
        ("{says: x, figure: unsteadiness, rules: [low > baseline]}", Outcome.UNDECIDED),
        ("{says: x, trend: [high, baseline]}", Outcome.HOLDS),
        ("{says: x, trend: [low, baseline]}", Outcome.CONTRADICTED),
        ("{says: x, collapse: [high]}", Outcome.CONTRADICTED),
        ("{says: x, undecidable: all have one budget}", Outcome.UNDECIDABLE),
    ],
)
def test_outcomes(tmp_path, claim, expected):
    one = outcome(tmp_path, claim)
    assert one.outcome == expected, one.why
    assert one.why


def test_a_collapse(tmp_path):
    folder = write_suite(
        tmp_path / "s", SUITE % "{says: x, collapse: [high]}", accuracy, collapsed=True
    )
    (one,) = claims_of(read_study(folder))
    assert one.outcome == Outcome.HOLDS
    assert one.why == ["high: 15 of 15 runs call more than 90 % of the images one class"]


def test_a_claim_without_its_runs(tmp_path):
    gone = [
        ("high", target, seed) for target in ("cartoon", "sketch", "photo") for seed in range(5)
    ]
    folder = write_suite(
        tmp_path / "s", SUITE % "{says: x, rules: [high > baseline]}", accuracy, without=gone
    )
    (one,) = claims_of(read_study(folder))
    assert (one.outcome, one.why) == (Outcome.NOT_RUN, ["no result of high"])


def test_rules_of_a_claim_share_holms_correction(tmp_path):
    one = outcome(tmp_path, "{says: x, rules: [alike > baseline], targets: [cartoon]}")
    many = outcome(tmp_path / "m", "{says: x, rules: [alike > baseline, high > baseline]}")
    (alone,) = one.why
    (among,) = [line for line in many.why if line.startswith("alike > baseline, cartoon")]
    assert float(among.split("p ")[-1]) > float(alone.split("p ")[-1])


def test_unsteadiness_needs_ten_tested_epochs(tmp_path):
    text = (SUITE % "{says: x, figure: unsteadiness, rules: [high > baseline]}").replace(
        "evaluate: each", "evaluate: 5"
    )
    study = read_study(write_suite(tmp_path / "s", text, accuracy))
    assert unsteadiness(study.arms["high"].one) is None
    (one,) = claims_of(study)
    assert one.outcome == Outcome.NOT_RUN


# --- in a suite -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        ({"claims": {"B1": {"says": "x", "rules": ["a > nobody"]}}}, "claim B1: no arm 'nobody'"),
        ({"claims": {"B1": {"says": "x", "rules": ["a >"]}}}, "claim B1: rule 'a >' lacks an arm"),
        ({"claims": {"B1": {"says": "x", "trend": ["a", "nobody"]}}}, "claim B1: no arm 'nobody'"),
        ({"primary": [["a", "nobody"]]}, "primary: no arm 'nobody'"),
    ],
)
def test_what_a_suite_names_must_be_there(content, words):
    from domainshift.records.schema import ArmIndex, TableIndex

    suite = Suite.model_validate(
        {
            "title": "t",
            "sources": ["s"],
            "targets": ["t"],
            "seeds": [0],
            "tables": {"a": {"title": "t"}},
        }
        | content
    )
    tables = [TableIndex(name="t", title="t", arms=[ArmIndex(name="a", cells=[])])]
    with pytest.raises(SuiteError, match=words):
        check_arms(suite, tables)
