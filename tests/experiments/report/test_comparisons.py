"""Which arms are compared, over which results, and with what verdict."""

import csv
import io
import itertools
import time

import pytest
import yaml
from domainshift.methods import RandomMaps
from domainshift.report import command, comparisons, findings, tables
from domainshift.report.comparisons import Comparison, Verdict, full_block, matchups
from domainshift.report.statistics import Estimate, equivalence, holm
from domainshift.report.study import Arm, Table, read_study
from made_records import EXACT, cell, comparison, exact, only, report_of, write_suite


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return report_of(write_suite(tmp_path_factory.mktemp("report") / "small", EXACT, exact))


def names(pairs):
    return {(arm.name, reference.name) for arm, reference in pairs}


# --- figures ----------------------------------------------------------------------------------

# By seed the arms are 0, 0, 0; 4, 4, 6; 0, 2, -2 above 40. Their means are 0, 14/3, 0, those of the seeds
# 4/3, 2, 4/3. The squares of what is left sum to 88/9 on 4 degrees of freedom, so a difference of two
# has the error sqrt(2 * 22/9 / 3).
ERROR = (44 / 27) ** 0.5
T = 2.776445  # of 4 degrees of freedom, at 95 %


def test_a_primary_comparison_by_hand(built):
    for target in ("cartoon", "sketch"):
        c = comparison(built, "random minus baseline", target)
        assert c.estimate.mean == pytest.approx(14 / 3)
        assert (c.estimate.df, c.estimate.error) == (4, pytest.approx(ERROR))
        assert c.estimate.high - c.estimate.mean == pytest.approx(T * ERROR, abs=1e-5)
        assert (c.seeds, c.pairs, c.gaps) == ([0, 1, 2], [("art_painting", target)], "")
        assert c.adjusted == pytest.approx(4 * c.estimate.p)  # the smallest of four, twice
        assert c.verdict == Verdict.UNDECIDED
        assert c.smallest > 14 / 3
        assert c.sentence == (
            f"random minus baseline: +4.7 ± 3.5 points over 3 seeds, art_painting to {target}: undecided: "
            f"three seeds cannot say (they find {c.smallest:.1f} points or more)"
        )
    assert comparison(built, "da minus baseline", "cartoon").estimate.mean == pytest.approx(0)


def test_the_family_is_what_the_suite_declares_on_each_target(built):
    family = built.comparisons.primary
    assert [(c.name, c.target) for c in family] == [
        (f"{arm} minus baseline", target)
        for arm in ("random", "da")
        for target in ("cartoon", "sketch")
    ]
    assert [c.adjusted for c in family] == pytest.approx(holm([c.estimate.p for c in family]))
    assert built.comparisons.exploratory == []


def test_a_mean_over_targets_has_an_interval_and_no_verdict(built):
    """Differences 4, 4, 6 and 0, 2, -2 of the means over both targets too."""
    assert cell(built, "random", None, "Minus baseline") == "+4.7 ± 3.5"
    assert cell(built, "random", None, "Verdict") == ""


def test_what_a_suite_does_not_declare_has_no_verdict(tmp_path):
    text = EXACT.replace("primary: [[random, baseline], [da, baseline]]", "primary: []")
    built = report_of(write_suite(tmp_path / "none", text, exact))
    c = comparison(built, "random minus baseline")
    assert (c.primary, c.verdict, c.adjusted) == (False, None, None)
    assert c.sentence == (
        "random minus baseline: +4.7 ± 3.5 points over 3 seeds and 2 pairs of domains"
    )
    assert built.comparisons.primary == [] and built.main[0] == findings.UNDECLARED


def test_targets_are_not_averaged_away(tmp_path):
    """+6 on cartoon and -6 on sketch: nothing on average, and two verdicts."""

    def accuracy(config, test, share):
        gain = 6 if test.domain == "cartoon" else -6
        noise = ((0, 0, 0.2), (0, 0.2, 0), (0.2, 0, 0))[
            ("baseline", "random", "da").index(config.mode)
        ]
        return 40 + gain * (config.mode == "random") + noise[config.seed]

    built = report_of(write_suite(tmp_path / "s", EXACT.replace("limit: 50, ", ""), accuracy))
    verdicts = {c.target: c.verdict for c in built.comparisons.primary if c.arm.name == "random"}
    assert verdicts == {"cartoon": Verdict.HIGHER, "sketch": Verdict.LOWER}
    equal = {c.verdict for c in built.comparisons.primary if c.arm.name == "da"}
    assert equal == {Verdict.EQUAL}
    assert "equal within 3 points" in built.main[2]
    assert cell(built, "random", None, "Minus baseline").startswith(("+0.0", "−0.0"))


def test_one_seed_has_no_interval(tmp_path):
    text = EXACT.replace("seeds: [0, 1, 2]", "seeds: [1]")
    built = report_of(write_suite(tmp_path / "one", text, exact))
    c = comparison(built, "random minus baseline", "cartoon")
    assert (c.verdict, c.adjusted, c.estimate.low) == (Verdict.ONE_SEED, None, None)
    assert "+4.0 points over 1 seed, art_painting to cartoon; one seed: no interval" in c.sentence
    assert cell(built, "random", "cartoon", "Last epoch") == "44.0"
    assert cell(built, "random", None, "Minus baseline") == "+4.0; one seed: no interval"
    assert built.main[0] == (
        "2 primary comparisons, 4 with the targets told apart: 4 of one seed, without an interval."
    )


@pytest.mark.parametrize(
    "mean, low, high, adjusted, equal, n, expected",
    [
        (2, 1, 3, 0.049, None, 5, Verdict.HIGHER),
        (-2, -3, -1, 0.049, None, 5, Verdict.LOWER),
        (2, 1, 3, 0.049, 0.01, 5, Verdict.HIGHER),  # and within the margin
        (2, 1, 3, 0.05, 0.05, 5, Verdict.UNDECIDED),
        (-2, -3, -1, 0.2, None, 5, Verdict.UNDECIDED),
        (0.5, -1, 2, 0.2, 0.049, 5, Verdict.EQUAL),
        (2, None, None, None, None, 1, Verdict.ONE_SEED),
        (2, None, None, None, None, 3, Verdict.NO_SPREAD),
    ],
)
def test_the_rule_of_verdicts(mean, low, high, adjusted, equal, n, expected):
    estimate = Estimate(mean, 1.0, low, high, adjusted, n, 0.5, 4)
    one = Comparison(
        "", None, None, estimate, primary=True, adjusted=adjusted, adjusted_equal=equal
    )
    assert one.verdict == expected
    assert one._replace(primary=False).verdict is None
    if low is not None:
        assert one._replace(confounds=["lr"]).verdict == Verdict.CONFOUNDED


def test_missing_runs_make_no_verdict_easier(tmp_path):
    """The family is what was declared: da has no run yet, and random keeps the factor of four."""
    gone = [("da", target, seed) for target in ("cartoon", "sketch") for seed in range(3)]
    built = report_of(write_suite(tmp_path / "gap", EXACT, exact, without=gone))
    c = comparison(built, "random minus baseline", "cartoon")
    assert c.adjusted == pytest.approx(4 * c.estimate.p)


def test_the_table_with_most_arms_gives_the_spread(tmp_path):
    """The first table has both arms, and one of them on cartoon alone."""
    content = yaml.safe_load(EXACT)
    arms = content["tables"]["shaping"]["arms"]
    few = {
        "title": "few",
        "baseline": "baseline",
        "arms": {n: arms[n] for n in ("baseline", "random")},
    }
    content["tables"] = {"few": few, **content["tables"]}
    built = report_of(write_suite(tmp_path / "s", yaml.safe_dump(content, sort_keys=False), exact))
    assert comparison(built, "random minus baseline", "cartoon").estimate.df == 4


def test_a_training_counts_once_in_the_spread(tmp_path):
    """AdaBN and the baseline measured again are tests of the baseline's training."""
    extra = """      adabn: {mode: adabn}
      recal: {mode: baseline, bn_at_test: source}
profiles:"""
    text = EXACT.replace("profiles:", extra).replace(
        "primary: [[random, baseline], [da, baseline]]",
        "primary: [[random, adabn], [da, baseline], [adabn, baseline]]",
    )
    noise = {"trained": 0, "source": 2, "target": -2}

    def accuracy(config, test, share):
        own = noise[test.bn] * (config.seed - 1) if config.mode == "baseline" else 0
        return exact(config, test, share) + own

    built = report_of(write_suite(tmp_path / "s", text, accuracy))
    for name in ("random minus adabn", "da minus baseline"):
        assert comparison(built, name, "cartoon").estimate.df == 4  # three trainings, three seeds
    assert comparison(built, "adabn minus baseline", "cartoon").estimate.df == 2  # its own spread
    (table,) = built.study.tables
    keys = [("art_painting", "cartoon", seed) for seed in range(3)]
    kept = comparisons.independent(table.compared, {"adabn"}, keys)
    assert [arm.name for arm in kept] == ["adabn", "random", "da"]


def test_primary_comparisons_of_several_sources_name_the_pair(tmp_path):
    text = EXACT.replace("sources: [art_painting]", "sources: [art_painting, photo]")
    built = report_of(write_suite(tmp_path / "s", text, exact))
    rows = tables.primary_rows(built.comparisons.primary)
    assert {row[1] for row in rows} == {
        f"{source} → {target}" for source in ("art_painting", "photo") for target in ("cartoon", "sketch")
    }  # fmt: skip


def test_higher_and_within_the_margin_are_both_said(built):
    c = comparison(built, "random minus baseline", "cartoon")
    both = c._replace(adjusted=0.01, adjusted_equal=0.02)
    assert both.verdict == Verdict.HIGHER
    assert both.verdict_words == "higher (p 0.010), and equal within 3 points (p 0.020)"


def test_the_least_margin_that_could_be_shown(built):
    """Of arms that are equal: both one-sided tests at a quarter of 5 %, on 4 degrees of freedom."""
    c = comparison(built, "da minus baseline", "cartoon")
    e = c.estimate
    assert c.provable == pytest.approx(3.495406 * e.error, rel=1e-5)
    zero = e._replace(mean=0.0)
    assert equivalence(zero, c.provable) == pytest.approx(0.0125)


def test_a_difference_that_cannot_be_is_not_said_to_be_found():
    """Two seeds with a spread of their own find differences of hundreds of points."""
    e = Estimate(-19.6, 12.6, -133, 94, 0.3, 2, 8.9, 1)
    one = Comparison("", None, None, e, seeds=(0, 1), primary=True, adjusted=1.0, smallest=1748.3)
    assert one.verdict_words == "undecided: two seeds cannot say"
    assert one._replace(smallest=40.0).verdict_words.endswith("(they find 40.0 points or more)")


# --- the largest full block -------------------------------------------------------------------

A, B, C = ("s", "a"), ("s", "b"), ("s", "c")


@pytest.mark.parametrize(
    "of_seed, expected",
    [
        ([], ([], [])),
        ([[A, B], [A, B], [A]], ([0, 1], [A, B])),  # 4 against 3
        ([[A, B], [A], [A]], ([0, 1, 2], [A])),  # 3 against 2
        ([[A, B], [A, C]], ([0, 1], [A])),  # 2 each: more seeds
        ([[A, B, C], [B, C], [A, C]], ([0, 1], [B, C])),
    ],
)
def test_full_blocks_by_hand(of_seed, expected):
    keys = [(*pair, seed) for seed, pairs in enumerate(of_seed) for pair in pairs]
    block = full_block(keys)
    assert (block.seeds, block.pairs) == expected and block.largest


def test_a_full_block_of_many_pairs_is_searched_step_by_step():
    """20 seeds, each of which lacks another pair: all blocks would be 2^20."""
    pairs = [("s", f"t{i:02}") for i in range(20)]
    keys = [(*pair, seed) for seed in range(20) for i, pair in enumerate(pairs) if i != seed]
    start = time.process_time()
    block = full_block(keys)
    assert time.process_time() - start < 1
    assert not block.largest
    # n of the seeds share 20 - n pairs: 10 by 10 is the largest, and the steps pass it
    assert len(block.seeds) == len(block.pairs) == 10
    assert all((*pair, seed) in keys for pair in block.pairs for seed in block.seeds)


def test_up_to_twelve_pairs_no_block_is_missed():
    """Against every set of pairs: the seeds that have it."""
    pairs = [("s", f"t{i}") for i in range(6)]
    of_seed = [[p for i, p in enumerate(pairs) if (seed * 7 + i * i) % 3] for seed in range(7)]
    block = full_block([(*pair, seed) for seed, own in enumerate(of_seed) for pair in own])
    best = max(
        len(some) * sum(set(some) <= set(own) for own in of_seed)
        for n in range(1, 7)
        for some in itertools.combinations(pairs, n)
    )
    assert len(block.seeds) * len(block.pairs) == best and len(pairs) <= comparisons.EXACT


def test_a_complete_block_of_many_pairs_is_certain():
    keys = [("s", f"t{i}", seed) for seed in range(5) for i in range(30)]
    block = full_block(keys)
    assert (len(block.seeds), len(block.pairs), block.largest) == (5, 30, True)


# --- which arms -------------------------------------------------------------------------------

CONTROLS = """
title: controls
defaults: {preset: course-template, epochs: 2, limit: 50}
sources: [art_painting]
targets: [cartoon]
seeds: [0, 1]
tables:
  record:
    title: record
    baseline: baseline
    switches: {mode: da, layers: [4]}
    arms:
      bn-only: {record_mode: train, apply_maps: false}
      da-train: {record_mode: train}
      da: {record_mode: eval}
  elsewhere:
    title: elsewhere
    arms:
      baseline: {mode: baseline}
  again:
    title: again
    baseline: baseline
    switches: {mode: da}
    arms:
      da: {layers: [4], record_mode: eval}
      da-conv9: {layers: [9]}
profiles: {full: {}}
"""


def test_which_arms_are_compared(tmp_path):
    """With the baseline of another table; with bn-only; and where one on/off or choice switch differs."""
    folder = write_suite(tmp_path / "controls", CONTROLS, lambda *_: 40)
    study = read_study(folder)
    assert names(matchups(study.tables[0]).all) == {
        ("bn-only", "baseline"), ("da-train", "baseline"), ("da", "baseline"),
        ("da-train", "bn-only"),  # apply_maps
        ("da", "da-train"),  # record_mode
        ("da", "bn-only"),  # both differ, but bn-only is what target maps are to be held against
    }  # fmt: skip
    assert [arm.name for arm in study.tables[2].compared] == ["baseline", "da", "da-conv9"]
    # layers are no on/off or choice switch: da and da-conv9 are not compared
    assert names(matchups(study.tables[2]).all) == {("da", "baseline"), ("da-conv9", "baseline")}
    built = report_of(folder)
    compared = [c.name for c in built.comparisons.exploratory]
    assert len(compared) == len(set(compared)) == 7  # da minus baseline, of two tables, counts once
    assert comparison(built, "da minus baseline").sentence.endswith(Verdict.NO_SPREAD)


AT_EQUAL_TERMS = """
title: fair
defaults: {preset: course-template, epochs: 1, limit: 50}
sources: [art_painting]
targets: [cartoon]
seeds: [0, 1]
tables:
  methods:
    title: methods
    baseline: baseline
    arms:
      baseline: {mode: baseline}
      random: {mode: random, bn_at_test: source}
      da: {mode: da, bn_at_test: source}
      adabn: {mode: adabn}
      dropout2d: {mode: dropout2d, bn_at_test: source}
      baseline-recal: {mode: baseline, bn_at_test: source}
  binarize-only:
    title: binarize-only
    arms:
      binarize-conv1: {mode: random, layers: 1, p_zero: 0}
      random-conv1: {mode: random, layers: 1, p_zero: 0.7}
      random-conv10-blocks: {mode: random, layers: 10, p_zero: 0.5, mask_unit: block, block_size: 3}
      binarize-conv10: {mode: random, layers: 10, p_zero: 0}
      random-conv10-zero: {mode: random, layers: 10, p_zero: 0.5, gradient: zero, epsilon: 0.1}
profiles: {full: {}}
"""


def test_arms_are_compared_with_what_comes_along_with_their_method(tmp_path):
    """BatchNorm measured again without shaping; binarization without zeros, on the same layers."""
    folder = write_suite(tmp_path / "fair", AT_EQUAL_TERMS, lambda *_: 40)
    methods, binarize_only = (names(matchups(table).all) for table in read_study(folder).tables)
    shaped = ("random", "da", "dropout2d")  # adabn does not measure on the source
    assert methods == {
        *((name, "baseline") for name in (*shaped, "adabn", "baseline-recal")),
        *((name, "baseline-recal") for name in shaped),
    }
    assert binarize_only == {
        ("random-conv1", "binarize-conv1"), ("random-conv10-blocks", "binarize-conv10"),
    }  # fmt: skip
    built = report_of(folder)
    assert built.audit.passes
    assert not comparison(built, "da minus baseline-recal").confounds
    assert comparison(built, "da minus baseline").confounds == ["bn_at_test trained -> source"]
    assert not comparison(built, "adabn minus baseline").confounds  # the statistics are the method
    assert cell(built, "da", "cartoon", "Flags") == "confounded: bn_at_test trained -> source"


def test_one_training_serves_several_arms(tmp_path):
    """AdaBN and both baselines are three tests of one network."""
    folder = write_suite(tmp_path / "fair", AT_EQUAL_TERMS, lambda *_: 40)
    arms = {arm.name: arm for arm in read_study(folder).tables[0].arms}
    shared = {arms[name].one.folder for name in ("baseline", "adabn", "baseline-recal")}
    assert len(shared) == 1 and arms["da"].one.folder not in shared


COMPARED = """
title: compared
defaults: {preset: course-template, epochs: 2, limit: 50}
sources: [art_painting]
targets: [cartoon]
seeds: [0, 1, 2]
tables:
  shaping:
    title: shaping
    baseline: baseline
    compare: [[random, dann], [da, random], [random, da], [da, baseline]]
    arms:
      baseline: {mode: baseline}
      random: {mode: random, layers: 10, p_zero: 0.5}
      da: {mode: da, layers: 4}
  others:
    title: others
    baseline: random
    compare: [[dann, random]]
    arms: {dann: {mode: dann}}
profiles: {full: {}}
"""


def test_what_the_suite_says_to_compare_is_compared_once(tmp_path):
    """Arms of other tables too; and the other table's reverse is the same."""
    gains = {"baseline": (0, 0, 0), "random": (4, 4, 6), "da": (0, 2, -2), "dann": (2, 0, 4)}
    folder = write_suite(tmp_path / "c", COMPARED, lambda c, *_: 40 + gains[c.mode][c.seed])
    built = report_of(folder)
    assert [c.name for c in built.comparisons.exploratory] == [
        "random minus dann", "da minus random", "da minus baseline", "random minus baseline",
    ]  # fmt: skip
    estimate = comparison(built, "random minus dann").estimate  # 2, 4, 2
    assert estimate.mean == pytest.approx(8 / 3)
    assert cell(built, "random", "cartoon", "Minus control").startswith("dann: +2.7 ± ")


def test_a_declared_comparison_is_one_of_its_arms_table(tmp_path):
    """Its arms may stand in two tables; the audit and the page then know it as one of the first."""
    text = COMPARED.replace("tables:", "primary: [[dann, da]]\ntables:", 1)
    gains = {"baseline": (0, 0, 0), "random": (4, 4, 6), "da": (0, 2, -2), "dann": (2, 0, 4)}
    folder = write_suite(tmp_path / "c", text, lambda c, *_: 40 + gains[c.mode][c.seed])
    study = read_study(folder)
    assert ("dann", "da") in names(study.tables[1].compare)
    built = report_of(folder)
    (c,) = built.comparisons.primary
    assert (c.name, c.target, c.estimate.df) == ("dann minus da", "cartoon", 2)  # no table has both
    assert "da: " in cell(built, "dann", "cartoon", "Verdict")


def test_the_difference_to_the_control_is_in_every_file(tmp_path):
    """By seed da is 2, 4 and 6 above baseline-recal, which has what comes along with it.

    Four trainings give the spread: three that are level and da, whose residuals sum to a square of 6 on
    6 degrees of freedom.
    """
    gains = {("da", "source"): (2, 4, 6), ("baseline", "trained"): (8, 8, 8)}

    def accuracy(config, test, share):
        return 40 + gains.get((config.mode, test.bn), (0, 0, 0))[config.seed]

    text = AT_EQUAL_TERMS.replace("seeds: [0, 1]", "seeds: [0, 1, 2]").split("  binarize-only:")[0]
    folder = write_suite(tmp_path / "f", text + "profiles: {full: {}}", accuracy)
    assert command.main([str(folder)]) == 0
    files = {s: (folder / f"report.{s}").read_text() for s in ("html", "md", "tex", "csv")}
    difference = "baseline-recal: +4.0 ± 2.0"
    assert difference in files["md"]
    assert difference.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}") in files["html"]
    row = next(r for r in csv.DictReader(io.StringIO(files["csv"])) if r["arm"] == "da")
    assert row["control"] == "baseline-recal"
    assert float(row["control_difference"]) == pytest.approx(4)
    assert float(row["control_low"]) == pytest.approx(4 - 2.446912 * (2 / 3) ** 0.5, abs=1e-4)
    headings = [column.heading for column in report_of(folder).sections[0].details.columns]
    assert headings.index("Minus control") < headings.index("Minus baseline")


def test_a_confounded_comparison_has_no_verdict(tmp_path):
    """random minus baseline is sure, and differs in the statistics at test too."""

    def accuracy(config, test, share):
        return 40 + (30 + config.seed if config.mode == "random" else config.seed % 2)

    text = AT_EQUAL_TERMS.replace("seeds: [0, 1]", "seeds: [0, 1, 2]")
    text = text.replace("tables:", "primary: [[random, baseline]]\ntables:", 1)
    built = report_of(write_suite(tmp_path / "f", text, accuracy))
    (c,) = built.comparisons.primary
    assert c.adjusted < 0.05 and c.verdict == Verdict.CONFOUNDED
    words = "no verdict: confounded by bn_at_test trained -> source"
    assert words in cell(built, "random", "cartoon", "Verdict")
    assert words in built.main[1] and built.decided == "0 of 1"


def test_confounds_stand_in_the_sentence_and_the_table(tmp_path):
    content = yaml.safe_load(EXACT)
    content["defaults"] |= {"epochs": None, "updates": 8}
    content["tables"]["shaping"]["arms"]["da"]["batch_size"] = 64
    built = report_of(write_suite(tmp_path / "s", yaml.safe_dump(content), exact))
    assert built.audit.passes
    sentence = comparison(built, "da minus baseline").sentence
    assert sentence.endswith("no verdict: confounded by batch_size 128 -> 64")
    for target in (None, "cartoon"):
        assert "confounded: batch_size 128 -> 64" in cell(built, "da", target, "Flags")


# --- the suites of the repository -------------------------------------------------------------


def test_target_maps_of_report_b_have_their_control(tmp_path):
    tables = ["baselines", "da-positions", "da-combinations", "da-pairing", "decreasing-p-zero"]
    folder = write_suite(
        tmp_path / "b", only("report-b", tables, targets=["cartoon"]), lambda *_: 40
    )
    study = read_study(folder)
    of = {t.name: names(matchups(t).all) for t in study.tables}
    pairs = of["da-positions"] | of["da-combinations"]
    for table in study.tables[1:3]:
        for arm in table.arms:
            assert arm.name in ("bn-only", "baseline-da") or (arm.name, "bn-only") in pairs
    switches = {arm.name: arm.one.training.switches for arm in study.tables[1].arms}
    differ = [n for n, v in switches["bn-only"].items() if v != switches["da-conv4"][n]]
    assert differ == ["apply_maps"]
    assert ("da-conv4-pairing-random", "da-conv4") in of["da-pairing"]
    assert ("random-conv1to7-falling", "random-conv1to7-p0.7") in of["decreasing-p-zero"]
    built = report_of(folder)
    assert cell(built, "bn-only", "cartoon", "Published") == ""  # nobody published it
    assert cell(built, "da-conv4", "cartoon", "Published") == "63.95"


def test_the_study_compares_shaping_with_the_other_methods(tmp_path):
    """And nothing but the method differs in what it compares."""
    text = only("study", ["methods"], sources=["art_painting"], targets=["cartoon"])
    folder = write_suite(tmp_path / "s", text, lambda *_: 40)
    built = report_of(folder)
    pairs = [(a.name, b.name) for a, b in read_study(folder).tables[0].compare]
    assert {"adabn", "dann", "dropout2d-conv10-p0.5"} <= {reference for _, reference in pairs}
    for arm, reference in pairs:
        assert not comparison(built, f"{arm} minus {reference}").confounds, (arm, reference)


# --- growth -----------------------------------------------------------------------------------


def test_work_grows_at_most_with_the_square_of_the_arms(tmp_path, monkeypatch):
    """Twice the arms ask the method's class four times as often, not eight times."""
    folder = write_suite(tmp_path / "small", EXACT, exact)
    (one,) = [arm for arm in read_study(folder).tables[0].arms if arm.name == "random"]
    calls = []
    monkeypatch.setattr(
        RandomMaps, "is_control", classmethod(lambda cls, control, own: bool(calls.append(1)))
    )

    def asked(n):
        calls.clear()
        arms = [Arm(f"arm{i}", one.planned, one.results) for i in range(n)]
        matchups(Table("t", "t", arms, baseline=arms[0]))
        return len(calls)

    assert asked(40) <= 4.2 * asked(20)
