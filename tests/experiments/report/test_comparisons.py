"""Which arms are compared, over which results, and with what verdict."""

import csv
import io
import itertools
import time

import pytest
import yaml
from domainshift.methods import RandomMaps
from domainshift.report import command, comparisons, findings
from domainshift.report.comparisons import Comparison, Verdict, full_block, matchups
from domainshift.report.render import page
from domainshift.report.statistics import Estimate
from domainshift.report.study import Arm, Table, read_study
from made_records import EXACT, cell, comparison, exact, only, report_of, write_suite


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return report_of(write_suite(tmp_path_factory.mktemp("report") / "small", EXACT, exact))


def names(pairs):
    return {(arm.name, reference.name) for arm, reference in pairs}


# --- figures ----------------------------------------------------------------------------------


def test_a_comparison_by_hand(built):
    """Differences 4, 4, 6: mean 14/3, spread 2/sqrt(3), error 2/3, t(0.95, 2) = 4.302653."""
    c = comparison(built, "random minus baseline")
    assert c.estimate.mean == pytest.approx(14 / 3)
    assert c.estimate.high - c.estimate.mean == pytest.approx(4.302653 * 2 / 3, abs=1e-5)
    # t = 7 on 2 degrees of freedom: p = 1 - 7 / sqrt(51); Holm doubles it
    assert c.estimate.p == pytest.approx(1 - 7 / 51**0.5)
    assert c.adjusted == pytest.approx(2 * (1 - 7 / 51**0.5))
    assert c.verdict == Verdict.HIGHER
    assert (c.seeds, len(c.pairs), c.gaps) == ([0, 1, 2], 2, "")
    assert c.sentence == (
        "random minus baseline: +4.7 ± 2.9 points over 3 seeds and 2 pairs of domains: higher "
        "(p 0.040 after Holm)"
    )
    other = comparison(built, "da minus baseline")  # differences 0, 2, -2
    assert other.estimate.mean == pytest.approx(0) and other.verdict == Verdict.SAME
    assert "+0.0 ± 5.0 points" in other.sentence and "not distinguishable" in other.sentence


def test_one_seed_has_no_interval(tmp_path):
    text = EXACT.replace("seeds: [0, 1, 2]", "seeds: [1]")
    built = report_of(write_suite(tmp_path / "one", text, exact))
    c = comparison(built, "random minus baseline")
    assert (c.verdict, c.adjusted, c.estimate.low) == (Verdict.ONE_SEED, None, None)
    assert "+4.0 points over 1 seed and 2 pairs of domains; one seed: no interval" in c.sentence
    assert cell(built, "random", "cartoon", "Last epoch") == "44.0"
    assert cell(built, "random", None, "Minus baseline") == "+4.0; one seed: no interval"
    assert built.main[0] == "2 comparisons: 2 without an interval, so without a verdict."


@pytest.mark.parametrize(
    "mean, low, high, adjusted, n, expected",
    [
        (2, 1, 3, 0.049, 5, Verdict.HIGHER),
        (-2, -3, -1, 0.049, 5, Verdict.LOWER),
        (2, 1, 3, 0.05, 5, Verdict.NOT_AFTER_HOLM),
        (-2, -3, -1, 0.2, 5, Verdict.NOT_AFTER_HOLM),
        (2, -1, 5, 0.2, 5, Verdict.SAME),
        (2, None, None, None, 1, Verdict.ONE_SEED),
        (2, None, None, None, 3, Verdict.NO_SPREAD),
    ],
)
def test_the_rule_of_verdicts(mean, low, high, adjusted, n, expected):
    estimate = Estimate(mean, 1.0, low, high, adjusted, n)
    assert Comparison("", None, None, estimate, adjusted=adjusted).verdict == expected


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
    compared = [c.name for c in built.comparisons]
    assert len(compared) == len(set(compared)) == 7  # da minus baseline, of two tables, counts once
    assert comparison(built, "da minus baseline").verdict == Verdict.NO_SPREAD


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
    """Arms of other tables too; within Holm's family; and the other table's reverse is the same."""
    gains = {"baseline": (0, 0, 0), "random": (4, 4, 6), "da": (0, 2, -2), "dann": (2, 0, 4)}
    folder = write_suite(tmp_path / "c", COMPARED, lambda c, *_: 40 + gains[c.mode][c.seed])
    built = report_of(folder)
    assert [c.name for c in built.comparisons] == [
        "random minus dann", "da minus random", "da minus baseline", "random minus baseline",
    ]  # fmt: skip
    estimate = comparison(built, "random minus dann").estimate  # 2, 4, 2
    assert estimate.mean == pytest.approx(8 / 3)
    assert estimate in [c.estimate for c in built.tested] and len(built.tested) == 4
    # t = 4 on 2 degrees of freedom; Holm's factor is 3: random minus baseline has t = 7
    assert comparison(built, "random minus dann").adjusted == pytest.approx(3 * (1 - 4 / 18**0.5))
    assert cell(built, "random", "cartoon", "Minus control") == "dann: +2.7 ± 2.9, p 0.172"


def test_the_difference_to_the_control_is_in_every_file(tmp_path):
    """By seed da is 2, 4 and 6 above baseline-recal, which has what comes along with it."""
    gains = {("da", "source"): (2, 4, 6), ("baseline", "trained"): (8, 8, 8)}

    def accuracy(config, test, share):
        return 40 + gains.get((config.mode, test.bn), (0, 0, 0))[config.seed]

    text = AT_EQUAL_TERMS.replace("seeds: [0, 1]", "seeds: [0, 1, 2]").split("  binarize-only:")[0]
    folder = write_suite(tmp_path / "f", text + "profiles: {full: {}}", accuracy)
    assert command.main([str(folder)]) == 0
    files = {s: (folder / f"report.{s}").read_text() for s in ("html", "md", "tex", "csv")}
    p = "baseline-recal: +4.0 ± 5.0, p 0.148"  # t = 12 ** 0.5: 0.0742, and Holm's factor is 2
    assert f"| {p} |" in files["md"] and p.replace("±", r"$\pm$") in files["tex"]
    assert p.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}") in files["html"]
    row = next(r for r in csv.DictReader(io.StringIO(files["csv"])) if r["arm"] == "da")
    assert (row["control"], row["control_verdict"]) == ("baseline-recal", Verdict.SAME)
    assert float(row["control_difference"]) == pytest.approx(4)
    assert float(row["control_low"]) == pytest.approx(4 - 4.302653 * 2 / 3**0.5, abs=1e-4)
    headings = [column.heading for column in report_of(folder).sections[0].grid.columns]
    assert headings.index("Minus control") < headings.index("Minus baseline")


def test_confounded_comparisons_come_last_and_are_not_counted(tmp_path):
    """random minus baseline is surest, and differs in the statistics at test too."""

    def accuracy(config, test, share):
        return 40 + (30 + config.seed if config.mode == "random" else config.seed % 2)

    text = AT_EQUAL_TERMS.replace("seeds: [0, 1]", "seeds: [0, 1, 2]")
    built = report_of(write_suite(tmp_path / "f", text, accuracy))
    surest = comparison(built, "random minus baseline")
    assert surest.verdict == Verdict.HIGHER and surest.confounds
    assert cell(built, "random", "cartoon", "Verdict").endswith("), confounded")
    order = [bool(c.confounds) for c in findings.ranked(built.comparisons)]
    assert order == sorted(order) and any(order)
    sound = [c for c in built.tested if not c.confounds]
    aside = len(built.tested) - len(sound)
    apart = sum(c.verdict.apart for c in sound)
    assert built.apart == f"{apart} of {len(sound)}; {aside} confounded aside"
    assert f"<dd>{built.apart}</dd>" in page(built)
    assert built.main[0].endswith(f"{sum(order)} confounded, and not counted.")
    assert f"{apart} higher than the reference" in built.main[0]


def test_confounds_stand_in_the_sentence_and_the_table(tmp_path):
    content = yaml.safe_load(EXACT)
    content["defaults"] |= {"epochs": None, "updates": 8}
    content["tables"]["shaping"]["arms"]["da"]["batch_size"] = 64
    built = report_of(write_suite(tmp_path / "s", yaml.safe_dump(content), exact))
    assert built.audit.passes
    assert comparison(built, "da minus baseline").sentence.endswith(
        "confounded by batch_size 128 -> 64"
    )
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
    for table in study.tables[1:3]:
        for arm in table.arms:
            assert arm.name in ("bn-only", "baseline-da") or (arm.name, "bn-only") in of[table.name]
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
