"""The rules of published claims: how they are read, and what decides them."""

import pytest
from domainshift import files
from domainshift.errors import SuiteError
from domainshift.records.claims import parsed
from domainshift.report import claims, command
from domainshift.report.claims import Outcome, RuleEstimate, claims_of, unsteadiness
from domainshift.report.comparisons import Comparisons, Verdict, matchups
from domainshift.report.statistics import Estimate
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


def only_claim(study):
    matched = {table.name: matchups(table) for table in study.tables}
    (one,) = claims_of(study, Comparisons(study, matched, {}))
    return one


def outcome(tmp_path, claim):
    folder = write_suite(tmp_path / "s", SUITE % claim, accuracy)
    return only_claim(read_study(folder))


# --- how rules are read -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a > b", [("a > b", {"a": 1, "b": -1}, ">", 1)]),
        ("a+b-1 = c", [("a+b-1 = c", {"a+b-1": 1, "c": -1}, "=", 1)]),  # + and - belong to names
        ("a - b != c - d", [("a - b != c - d", {"a": 1, "b": -1, "c": -1, "d": 1}, "!=", 1)]),
        ("a - x > b - x", [("a - x > b - x", {"a": 1, "b": -1}, ">", 1)]),  # x is no part of it
        ("a + b < c + d", [("a + b < c + d", {"a": 1, "b": 1, "c": -1, "d": -1}, "<", 2)]),  # means
        (
            "a, b > c, d + e",
            [
                ("a > c", {"a": 1, "c": -1}, ">", 1),
                ("a > d + e", {"a": 1, "d": -1, "e": -1}, ">", 1),
                ("b > c", {"b": 1, "c": -1}, ">", 1),
                ("b > d + e", {"b": 1, "d": -1, "e": -1}, ">", 1),
            ],
        ),
    ],
)
def test_rules(text, expected):
    assert parsed(text) == expected


NO_RULES = (
    "", "a", "a > b > c", "a > ", "> b", "a b > c", "a - > c", "a + + b > c", "a >> b", "- a > b",
    "a > a", "a - b > a - b",
)  # fmt: skip


@pytest.mark.parametrize("text", NO_RULES)
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
        ("{says: x, rules: [high - baseline != baseline - low]}", Outcome.CONTRADICTED),  # equal
        ("{says: x, rules: [low - baseline != high - baseline]}", Outcome.HOLDS),  # whichever way
        ("{says: x, rules: [high + alike > low + baseline]}", Outcome.HOLDS),
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
    one = only_claim(read_study(folder))
    assert one.outcome == Outcome.HOLDS
    (why,) = one.why
    assert why.startswith("high: 15 of 15 runs call more than 90 % of the images one class")


def test_a_collapse_is_undecided_until_all_runs_are_there(tmp_path):
    text = SUITE % "{says: x, collapse: [high]}"
    gone = [("high", "photo", 4)]
    folder = write_suite(tmp_path / "s", text, accuracy, collapsed=True, without=gone)
    assert only_claim(read_study(folder)).outcome == Outcome.UNDECIDED
    one_seed = text.replace("[0, 1, 2, 3, 4]", "[0]")
    folder = write_suite(tmp_path / "o", one_seed, accuracy)
    assert only_claim(read_study(folder)).outcome == Outcome.UNDECIDED


def test_a_claim_without_its_runs(tmp_path):
    gone = [
        ("high", target, seed) for target in ("cartoon", "sketch", "photo") for seed in range(5)
    ]
    folder = write_suite(
        tmp_path / "s", SUITE % "{says: x, rules: [high > baseline]}", accuracy, without=gone
    )
    one = only_claim(read_study(folder))
    assert (one.outcome, one.why) == (Outcome.NOT_RUN, ["no result of high"])


def test_all_rules_must_hold_so_each_needs_no_correction(tmp_path):
    one = outcome(tmp_path, "{says: x, rules: [alike > baseline], targets: [cartoon]}")
    many = outcome(tmp_path / "m", "{says: x, rules: [alike > baseline, high > baseline]}")
    assert one.why[0] in many.why  # with the same p


def test_a_rule_is_contradicted_after_holms_correction_alone():
    """p 0.03 the wrong way, beside another rule: 0.06."""
    e = Estimate(-2.0, 1.0, -3.9, -0.1, 0.03, 5, 0.7, 4)
    rule = RuleEstimate("a > b", ">", None, e, 0.03)
    assert claims.outcome(rule, 0.06, None, None) == Outcome.UNDECIDED
    assert claims.outcome(rule, 0.03, None, None) == Outcome.CONTRADICTED
    assert claims.outcome(rule._replace(relation="<"), 0.06, None, None) == Outcome.HOLDS


def test_two_seeds_decide_no_claim(tmp_path):
    text = (SUITE % "{says: x, rules: [high > baseline]}").replace("[0, 1, 2, 3, 4]", "[0, 1]")
    one = only_claim(read_study(write_suite(tmp_path / "s", text, accuracy)))
    assert one.outcome == Outcome.UNDECIDED
    assert all(why.endswith("; 2 seeds cannot decide") for why in one.why)


def test_a_claim_that_is_a_primary_comparison_agrees_with_its_verdict(tmp_path):
    """A difference that is sure alone, and undecided in a family of twelve."""

    def noisy(config, test, share):
        arm = config.options.p_zero[0] if config.mode == "random" else 0
        noise = ((4, -3, 5, -4, 0), (0, 5, -4, 3, -3), (-4, 0, 3, 4, -4), (3, -4, 0, -2, 4))
        return 50 + 7.5 * (arm == 0.1) + noise[round(10 * arm)][config.seed]

    text = SUITE % "{says: x, rules: [baseline < high], targets: [cartoon]}"
    study = read_study(write_suite(tmp_path / "alone", text, noisy))
    assert only_claim(study).outcome == Outcome.HOLDS
    primary = (
        "primary: [[high, baseline], [alike, baseline], [low, baseline], [alike, low]]\ntables:"
    )
    text = text.replace("tables:", primary, 1)
    study = read_study(write_suite(tmp_path / "primary", text, noisy))
    matched = {table.name: matchups(table) for table in study.tables}
    (c, *_) = Comparisons(study, matched, {}).primary
    assert (c.target, c.verdict) == ("cartoon", Verdict.UNDECIDED)
    one = only_claim(study)
    assert one.outcome == Outcome.UNDECIDED
    assert f"p {c.adjusted:.3f}" in one.why[0] and "−" in one.why[0]  # turned round


def test_a_claim_of_confounded_arms_cannot_be_decided(tmp_path):
    text = (SUITE % "{says: x, rules: [high > baseline]}").replace(
        "high: {mode: random,", "high: {batch_size: 64, mode: random,"
    )
    one = only_claim(read_study(write_suite(tmp_path / "s", text, accuracy)))
    assert one.outcome == Outcome.UNDECIDABLE
    assert one.why[0].startswith("confounded by batch_size 128 -> 64")


def test_a_trend_rises_at_each_step(tmp_path):
    """A slope over three targets would hold where one of them alone gains."""

    def one_target(config, test, share):
        arm = config.options.p_zero[0] if config.mode == "random" else 0
        gain = 20 if arm == 0.1 and test.domain == "cartoon" else 0
        place = (config.seed + round(10 * arm)) % 5
        return {"cartoon": 50, "sketch": 30, "photo": 70}[test.domain] + gain + NOISE[place]

    text = SUITE % "{says: x, trend: [high, baseline]}"
    one = only_claim(read_study(write_suite(tmp_path / "s", text, one_target)))
    assert one.outcome == Outcome.CONTRADICTED
    first, second = one.why
    assert first.startswith("high minus baseline, cartoon above photo: +20.")
    assert second.startswith("high minus baseline, sketch above cartoon: −20.")


def test_unsteadiness_needs_ten_tested_epochs(tmp_path):
    text = (SUITE % "{says: x, figure: unsteadiness, rules: [high > baseline]}").replace(
        "evaluate: each", "evaluate: 5"
    )
    study = read_study(write_suite(tmp_path / "s", text, accuracy))
    assert unsteadiness(study.arms["high"].one) is None
    one = only_claim(study)
    assert (
        one.outcome == Outcome.UNDECIDABLE
        and "a test after each of the last 10 epochs" in one.why[0]
    )


# --- in a suite -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        ({"claims": {"B1": {"says": "x", "rules": ["a > nobody"]}}}, "claim B1: no arm 'nobody'"),
        ({"claims": {"B1": {"says": "x", "rules": ["a >"]}}}, "claim B1: rule 'a >' lacks an arm"),
        ({"claims": {"B1": {"says": "x", "trend": ["a", "nobody"]}}}, "claim B1: no arm 'nobody'"),
        ({"claims": {"B1": {"says": "x", "rules": ["a > a"]}}}, "claim B1: .* an arm with itself"),
        ({"claims": {"B1": {"says": "x"}}}, "claim B1: none given; allowed: one of rules, trend"),
        (
            {"claims": {"B1": {"says": "x", "rules": ["a > b"], "targets": ["nope"]}}},
            "claim B1: no arm is tested on 'nope'",
        ),
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
    tables = [
        TableIndex(name="t", title="t", arms=[ArmIndex(name=name, cells=[]) for name in "ab"])
    ]
    with pytest.raises(SuiteError, match=words):
        check_arms(suite, tables)


INDEX = {
    "claims": {
        "two kinds": {"says": "x", "rules": ["a > b"], "collapse": ["a"]},
        "no figure": {"says": "x", "rules": ["a > b"], "figure": "foo"},
        "no margin": {"says": "x", "rules": ["a = b"], "margin": -1},
        "no rule": {"says": "x", "rules": ["a >> b"]},
    },
    "primary": {
        "itself": [["a", "a"]],
        "twice": [["a", "b"], ["b", "a"]],
        "seven": [["a", str(i)] for i in range(7)],
    },
    "margin": {"negative": -1.0},
}


@pytest.mark.parametrize("key, name", [(key, name) for key in INDEX for name in INDEX[key]])
def test_a_suite_json_that_no_suite_gives_is_refused_in_one_line(tmp_path, capsys, key, name):
    folder = write_suite(tmp_path / "s", SUITE % "{says: x, rules: [high > baseline]}", accuracy)
    index = files.read_json(folder / "suite.json")
    value = INDEX[key][name]
    files.write_json(
        folder / "suite.json", index | {key: {name: value} if key == "claims" else value}
    )
    assert command.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and key in error
