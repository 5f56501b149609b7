"""The rules of published claims: how they are read, and what decides them."""

import re
from collections import Counter

import numpy as np
import pytest
import yaml
from domainshift import files
from domainshift.errors import SuiteError
from domainshift.records.claims import parsed
from domainshift.report import claims, command
from domainshift.report.claims import Outcome, Question, RuleEstimate, claims_of, unsteadiness
from domainshift.report.comparisons import Comparisons, Verdict, matchups
from domainshift.report.statistics import Estimate, beyond, equivalence
from domainshift.report.study import read_study
from domainshift.sweep.plan import check_arms
from domainshift.sweep.schema import SUITES as SUITE_FILES
from domainshift.sweep.schema import Suite
from made_records import write_suite
from simulated import claimed, study_of

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
        ("a > b", [[("a > b", {"a": 1, "b": -1}, ">", 1)]]),
        ("a+b-1 = c", [[("a+b-1 = c", {"a+b-1": 1, "c": -1}, "=", 1)]]),  # + and - belong to names
        ("a - b != c - d", [[("a - b != c - d", {"a": 1, "b": -1, "c": -1, "d": 1}, "!=", 1)]]),
        ("a - x > b - x", [[("a - x > b - x", {"a": 1, "b": -1}, ">", 1)]]),  # x is no part of it
        (
            "a + b < c + d",
            [[("a + b < c + d", {"a": 1, "b": 1, "c": -1, "d": -1}, "<", 2)]],
        ),  # means
        (
            "a, b > c, d + e - f",
            [
                [("a > c", {"a": 1, "c": -1}, ">", 1)],
                [("a > d + e - f", {"a": 1, "d": -1, "e": -1, "f": 1}, ">", 1)],
                [("b > c", {"b": 1, "c": -1}, ">", 1)],
                [("b > d + e - f", {"b": 1, "d": -1, "e": -1, "f": 1}, ">", 1)],
            ],
        ),
        (
            "a or b, c > d",
            [
                [("a > d", {"a": 1, "d": -1}, ">", 1), ("b > d", {"b": 1, "d": -1}, ">", 1)],
                [("c > d", {"c": 1, "d": -1}, ">", 1)],
            ],
        ),
    ],
)
def test_rules(text, expected):
    assert parsed(text) == expected


NO_RULES = (
    "", "a", "a > b > c", "a > ", "> b", "a b > c", "a - > c", "a + + b > c", "a >> b", "- a > b",
    "a > a", "a - b > a - b", "a or > b", "or a > b", "a or or b > c", "a > b or c", "a, or b > c",
)  # fmt: skip


@pytest.mark.parametrize("text", NO_RULES)
def test_what_is_no_rule(text):
    with pytest.raises(ValueError, match="allowed: ARM"):
        parsed(text)


@pytest.mark.parametrize("text", ["a + b > base", "a - b > c", "a > b - c", "x, a + b = base"])
def test_a_rule_whose_sides_have_unlike_numbers_of_arms_is_none(text):
    """The sum of two accuracies is above one of them, whatever ran."""
    with pytest.raises(
        ValueError, match=r"has \d arms left and \d right, .* as many on both sides"
    ):
        parsed(text)


def test_or_belongs_to_an_order():
    with pytest.raises(ValueError, match="'or' beside = is not allowed; allowed: > or <"):
        parsed("a or b = c")


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
    rule = RuleEstimate("a > b", ">", "", e, 0.03)
    assert claims.outcome(Question([rule]), 0.06) == Outcome.UNDECIDED
    assert claims.outcome(Question([rule]), 0.03) == Outcome.CONTRADICTED
    assert [finding.outcome for finding in claims.decided([Question([rule])])] == ["contradicted"]
    two = claims.decided([Question([rule]), Question([rule._replace(relation="<")])])
    assert [finding.outcome for finding in two] == [Outcome.UNDECIDED, Outcome.HOLDS]


def test_of_sums_between_or_one_must_hold():
    """Its p is doubled; to contradict, both must be decided the other way."""
    high = Estimate(2.0, 1.0, 0.1, 3.9, 0.03, 5, 0.7, 4)
    low = Estimate(-2.0, 1.0, -3.9, -0.1, 0.03, 5, 0.7, 4)
    up, sure = (RuleEstimate("a > c", ">", "", high, p) for p in (0.03, 0.02))
    down, unsure = (RuleEstimate("b > c", ">", "", low, p) for p in (0.03, 0.2))
    for rules, expected in (
        ([up, down], Outcome.UNDECIDED),  # 0.06
        ([sure, down], Outcome.HOLDS),
        ([down, down], Outcome.CONTRADICTED),
        ([down, unsure], Outcome.UNDECIDED),
    ):
        (finding,) = claims.decided([Question(rules)])
        assert finding.outcome == expected
        assert re.fullmatch(
            r"either a > c: .*, p .*, or (a|b) > c: .*, p .*|either b > c: .*", finding.sentence
        )


# a difference of +1, surely not zero and surely within 2
SMALL = Estimate(1.0, 0.4, 0.5, 1.5, 0.005, 5, 0.2, 4)


@pytest.mark.parametrize("relation", ["=", "!="])
def test_a_small_difference_is_both_within_the_margin_and_not_zero(relation):
    rule = RuleEstimate(
        "a", relation, "", SMALL, SMALL.p, 2.0, equivalence(SMALL, 2.0), beyond(SMALL, 2.0)
    )
    (finding,) = claims.decided([Question([rule])])
    assert finding.outcome == Outcome.HOLDS


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


# --- targets that lack runs -------------------------------------------------------------------


def cells(arm, target, seeds=range(5)):
    return [(arm, target, seed) for seed in seeds]


def test_a_claim_waits_for_all_its_targets(tmp_path):
    """It would hold on the two others."""
    text = SUITE % "{says: x, rules: [high > baseline]}"
    gone = cells("high", "sketch")
    one = only_claim(read_study(write_suite(tmp_path / "s", text, accuracy, without=gone)))
    assert one.outcome == Outcome.NOT_RUN
    lacking, *others = one.why
    assert lacking == "sketch: no result of high"
    assert [why.split(":")[0] for why in others] == [
        "high > baseline, cartoon", "high > baseline, photo",
    ]  # fmt: skip
    gone = cells("high", "sketch", (0, 1)) + cells("baseline", "sketch", (2, 3, 4))
    one = only_claim(read_study(write_suite(tmp_path / "c", text, accuracy, without=gone)))
    assert one.outcome == Outcome.NOT_RUN
    assert one.why[0] == "sketch: no seed has results of high and baseline"


def test_a_claim_on_a_target_that_its_arms_lack_is_not_run(tmp_path):
    """`other` is trained for cartoon alone; another arm is tested on sketch."""
    more = "  more: {title: more, targets: [cartoon], arms: {other: {mode: random, p_zero: 0.6}}}\nprofiles:"
    for name, claim in (("r", "rules: [high > other]"), ("c", "collapse: [other]")):
        text = (SUITE % f"{{says: x, {claim}, targets: [cartoon, sketch]}}").replace(
            "profiles:", more
        )
        one = only_claim(read_study(write_suite(tmp_path / name, text, lambda *_: 40)))
        assert one.outcome == Outcome.NOT_RUN
        assert "sketch: not planned for all of" in one.why[0]


def test_a_collapse_waits_for_all_its_targets(tmp_path):
    text = SUITE % "{says: x, collapse: [high]}"
    gone = cells("high", "photo")
    folder = write_suite(tmp_path / "s", text, accuracy, collapsed=True, without=gone)
    one = only_claim(read_study(folder))
    assert (one.outcome, one.why[0]) == (Outcome.NOT_RUN, "photo: no result of high")


def test_a_trend_needs_all_its_targets(tmp_path):
    """Two targets of five seeds are a larger block than three of three."""
    text = SUITE % "{says: x, trend: [high, baseline]}"
    gone = cells("high", "sketch", (3, 4))
    one = only_claim(read_study(write_suite(tmp_path / "s", text, accuracy, without=gone)))
    assert one.outcome == Outcome.HOLDS
    first, second = one.why
    assert "cartoon above photo" in first and "sketch above cartoon" in second
    gone = cells("high", "sketch")
    one = only_claim(read_study(write_suite(tmp_path / "t", text, accuracy, without=gone)))
    assert (one.outcome, one.why) == (Outcome.NOT_RUN, ["sketch: no result of high"])
    gone = cells("high", "sketch", (3, 4)) + cells("high", "photo", (0, 1, 2))
    one = only_claim(read_study(write_suite(tmp_path / "u", text, accuracy, without=gone)))
    assert one.outcome == Outcome.NOT_RUN
    assert one.why == ["cartoon and sketch and photo: no seed has results of high and baseline"]


def test_a_trend_is_about_its_targets(tmp_path):
    """`high` gains 4, 8 and 12, and here nothing on photo beyond cartoon."""
    one = outcome(tmp_path, "{says: x, trend: [high, baseline], targets: [sketch, photo]}")
    (why,) = one.why
    assert one.outcome == Outcome.HOLDS and "sketch above photo" in why


def test_a_trend_on_one_target_cannot_be_decided(tmp_path):
    text = (SUITE % "{says: x, trend: [high, baseline]}").replace(
        "[cartoon, sketch, photo]", "[photo]"
    )
    one = only_claim(read_study(write_suite(tmp_path / "s", text, accuracy)))
    assert (one.outcome, one.why) == (
        Outcome.UNDECIDABLE, ["a trend needs two targets or more"],
    )  # fmt: skip


def test_equal_needs_a_margin(tmp_path):
    text = (SUITE % "{says: x, rules: [alike = baseline]}").replace("margin: 3.0\n", "")
    one = only_claim(read_study(write_suite(tmp_path / "s", text, accuracy)))
    assert one.outcome == Outcome.UNDECIDABLE and one.why[0].startswith("no margin is stated")


def test_pairs_of_several_sources_are_named(tmp_path):
    text = (SUITE % "{says: x, rules: [high > baseline], targets: [cartoon]}").replace(
        "sources: [art_painting]", "sources: [art_painting, sketch]"
    )
    one = only_claim(read_study(write_suite(tmp_path / "s", text, accuracy)))
    assert [why.split(": ")[0] for why in one.why] == [
        "high > baseline, art_painting to cartoon", "high > baseline, sketch to cartoon",
    ]  # fmt: skip


# --- claims and verdicts on one page ----------------------------------------------------------


def small_difference(config, test, share):
    """`high` is 1 above the baseline: not zero, and within the margin of 3."""
    arm = config.options.p_zero[0] if config.mode == "random" else 0
    place = (config.seed + round(10 * arm)) % 5
    return 50 + (arm == 0.1) + 0.3 * NOISE[place]


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("high = baseline", Outcome.HOLDS),
        ("high != baseline", Outcome.HOLDS),
        ("alike = baseline", Outcome.HOLDS),
        ("alike != baseline", Outcome.CONTRADICTED),
        ("low != baseline", Outcome.CONTRADICTED),
    ],
)
def test_equal_and_unequal_of_a_primary_comparison(tmp_path, rule, expected):
    text = (SUITE % f"{{says: x, rules: ['{rule}'], targets: [cartoon]}}").replace(
        "tables:", "primary: [[high, baseline], [alike, baseline], [low, baseline]]\ntables:", 1
    )
    study = read_study(write_suite(tmp_path / "s", text, small_difference))
    matched = {table.name: matchups(table) for table in study.tables}
    family = {(c.arm.name, c.target): c for c in Comparisons(study, matched, {}).primary}
    words = family[rule.split()[0], "cartoon"].verdict_words
    one = only_claim(study)
    assert one.outcome == expected, one.why
    assert ("higher" in words) == (rule.startswith("high"))
    assert "equal within 3 points" in words  # beside `higher` too


def test_a_margin_of_its_own_takes_no_claim_out_of_the_family(tmp_path):
    def noisy(config, test, share):
        arm = config.options.p_zero[0] if config.mode == "random" else 0
        noise = ((4, -3, 5, -4, 0), (0, 5, -4, 3, -3), (-4, 0, 3, 4, -4), (3, -4, 0, -2, 4))
        return 50 + 7.5 * (arm == 0.1) + noise[round(10 * arm)][config.seed]

    primary = (
        "primary: [[high, baseline], [alike, baseline], [low, baseline], [alike, low]]\ntables:"
    )
    text = SUITE % "{says: x, rules: [high > baseline], targets: [cartoon], margin: 1}"
    text = text.replace("tables:", primary, 1)
    one = only_claim(read_study(write_suite(tmp_path / "s", text, noisy)))
    assert one.outcome == Outcome.UNDECIDED


# --- simulated --------------------------------------------------------------------------------

SUITES = {
    name: yaml.safe_load((SUITE_FILES / f"{name}.yaml").read_text())
    for name in ("report-a", "report-b")
}


def of_suite(name, number):
    claim = SUITES[name]["claims"][number]
    return {key: claim[key] for key in ("rules", "targets") if key in claim}


def drawn(means, seed, spread=2.0):
    """A study on cartoon of five seeds with these true means."""
    generator = np.random.default_rng([seed, 22])
    shared = generator.normal(size=5)
    return study_of(
        {
            arm: {"cartoon": m + shared + spread * generator.normal(size=5)}
            for arm, m in means.items()
        },
        margin=2.0,
    )


RATES = [f"random-conv-every3-p{p}" for p in (0.05, 0.1, 0.2, 0.6)]


def outcomes_of(means, claim, studies=150, **more):
    counts = Counter(claimed(drawn(means, seed, **more), **claim)[0] for seed in range(studies))
    return {outcome: n / studies for outcome, n in counts.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "means", [(57, 60, 57, 40), (57, 58, 61, 50), (59, 60, 55, 54), (54, 55, 60, 59)]
)
def test_a_best_rate_from_01_to_02_is_not_contradicted(means):
    """Wherever it lies: at 0.1 with 0.2 below 0.05, or at 0.2 with 0.1 below 0.6."""
    shares = outcomes_of(dict(zip(RATES, means, strict=True)), of_suite("report-a", "A5"))
    assert shares.get(Outcome.CONTRADICTED, 0) <= 0.05


@pytest.mark.slow
def test_the_best_rate_is_found_where_it_is():
    claim = of_suite("report-a", "A5")
    for means in ((50, 60, 50, 40), (50, 52, 60, 40)):
        shares = outcomes_of(dict(zip(RATES, means, strict=True)), claim, 60)
        assert shares[Outcome.HOLDS] > 0.8
    for means in ((60, 50, 50, 40), (40, 50, 50, 60)):
        shares = outcomes_of(dict(zip(RATES, means, strict=True)), claim, 60)
        assert shares[Outcome.CONTRADICTED] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("difference", [0.0, 1.0, 1.9, -1.9])
def test_equal_is_not_contradicted_where_it_is_true(difference):
    """Within the margin of 2, also where a difference of 1.9 is surely not zero."""
    means = {"base": 50, "a": 50 + difference, "b": 50, "c": 50}
    shares = outcomes_of(means, {"rules": ["a = base"]}, spread=0.8)
    assert shares.get(Outcome.CONTRADICTED, 0) <= 0.08


def test_equal_is_contradicted_far_beyond_the_margin():
    means = {"base": 50, "a": 60, "b": 50, "c": 50}
    outcome, (why,) = claimed(drawn(means, 0, 0.5), rules=["a = base"])
    assert outcome == Outcome.CONTRADICTED and "; beyond 2 points, p " in why


@pytest.mark.parametrize(
    "falls, expected",
    [
        ((58, 61, 50), "holds"),
        ((70, 60, 50), "undecided"),
        ((60, 60, 60), "undecided"),
        ((80, 60, 50), "contradicted"),
    ],
)
def test_an_abrupt_fall_is_larger_than_the_change_before_it(falls, expected):
    """Report B's claim B11: 70, 60, 50 falls, and evenly."""
    arms = [f"random-conv1-p{p}" for p in (0.5, 0.7, 0.9)]
    noise = ((0.3, -0.2, 0.5, -0.4, -0.2), (-0.4, 0.3, 0.2, 0.1, -0.2), (0.2, 0.3, -0.4, -0.3, 0.2))
    figures = {
        arm: {"cartoon": [fall + n for n in own]}
        for arm, fall, own in zip(arms, falls, noise, strict=True)
    }
    outcome, why = claimed(study_of(figures), **of_suite("report-b", "B11"))
    assert outcome == expected, why


@pytest.mark.parametrize("relu, expected", [(40, "holds"), (70, "contradicted")])
def test_convolutions_are_held_against_both_other_places(relu, expected):
    """Report A's claim A3; BatchNorm is above ReLU or not."""
    means = {"conv": 60, "bn": 50, "relu": relu}
    figures = {
        f"random-{place}-every3-p0.2": {
            t: np.add(m, NOISE[i:] + NOISE[:i]) for t in ("sketch", "photo")
        }
        for i, (place, m) in enumerate(means.items())
    }
    outcome, why = claimed(study_of(figures), **of_suite("report-a", "A3"))
    assert outcome == expected and len(why) == 4


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
        ({"claims": {"B1": {"says": "x", "rules": ["a + b > a"]}}}, "has 2 arms left and 1 right"),
        (
            {"claims": {"B1": {"says": "x", "trend": ["a", "b"], "targets": ["t"]}}},
            "claim B1: targets .* beside trend is not allowed; allowed: two or more",
        ),
        (
            {"claims": {"B1": {"says": "x", "trend": ["a", "b"], "figure": "unsteadiness"}}},
            "claim B1: figure 'unsteadiness' without rules is not allowed",
        ),
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
        "unlike sides": {"says": "x", "rules": ["high + low > baseline"]},
        "trend of one": {"says": "x", "trend": ["baseline", "baseline"]},
        "trend on one": {"says": "x", "trend": ["high", "baseline"], "targets": ["photo"]},
        "no target": {"says": "x", "rules": ["high > baseline"], "targets": []},
        "target twice": {"says": "x", "rules": ["high > baseline"], "targets": ["photo", "photo"]},
        "unknown target": {"says": "x", "rules": ["high > baseline"], "targets": ["nope"]},
        "unknown arm": {"says": "x", "rules": ["high > nobody"]},
        "large margin": {"says": "x", "rules": ["high = baseline"], "margin": 1e308},
    },
    "primary": {
        "itself": [["a", "a"]],
        "twice": [["a", "b"], ["b", "a"]],
        "seven": [["a", str(i)] for i in range(7)],
    },
    "margin": {"negative": -1.0, "large": 1e308},
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
    assert len(error.splitlines()) == 1 and key.rstrip("s") in error
