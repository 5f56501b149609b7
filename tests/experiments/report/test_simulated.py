"""Simulated studies: what is there is found, and nothing is found where there is nothing."""

from collections import Counter

import pytest
from domainshift.report.comparisons import Verdict
from made_records import report_of, write_suite
from simulated import (
    EFFECTS,
    SUITE,
    accuracy_of,
    compared,
    few_trainings,
    study_in_memory,
)

STUDIES = 200


def verdicts(**options):
    """How often each comparison on each target came to each verdict, in many studies."""
    counts, false = Counter(), 0
    for seed in range(STUDIES):
        primary = compared(study_in_memory(seed, **options))
        assert len(primary) == 18
        counts.update((c.name, c.target, c.verdict) for c in primary)
        false += any(c.verdict in (Verdict.HIGHER, Verdict.LOWER) for c in primary)
    return counts, false / STUDIES


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_where_there_is_nothing_nothing_is_found(seeds):
    """At most 5 studies of 100 have a false verdict; of 200 drawn ones 15 are still compatible."""
    _, false = verdicts(seeds=seeds)
    assert false <= 0.075


@pytest.mark.slow
@pytest.mark.parametrize("trainings, tests", [(5, 2), (3, 4)])
def test_tests_of_one_training_pass_for_no_agreement_of_arms(trainings, tests):
    """Tests of a training that correlate by 0.95 count once in the common spread."""
    false = 0
    for seed in range(STUDIES):
        primary = compared(few_trainings(seed, trainings, tests))
        false += any(c.verdict in (Verdict.HIGHER, Verdict.LOWER) for c in primary)
        assert all(c.estimate.df in (4, 4 * (trainings - 1)) for c in primary)
    assert false / STUDIES <= 0.075


@pytest.mark.slow
def test_published_effects_are_found():
    counts, _ = verdicts(effects=EFFECTS)

    def power(arm, reference, target, verdict):
        return counts[f"{arm} minus {reference}", target, verdict] / STUDIES

    assert power("random-conv1-p0.7", "baseline", "cartoon", Verdict.HIGHER) > 0.8
    assert power("random-conv1-p0.7", "baseline", "photo", Verdict.LOWER) > 0.98
    assert power("da-conv4", "bn-only", "cartoon", Verdict.HIGHER) > 0.8
    assert counts["random-conv1-p0.7 minus baseline", "cartoon", Verdict.LOWER] == 0


@pytest.mark.slow
def test_equal_arms_are_found_equal_where_the_margin_allows():
    counts, _ = verdicts(margin=4.0)
    assert counts["da-conv4 minus bn-only", "photo", Verdict.EQUAL] > 0.9 * STUDIES
    assert sum(n for (_, target, v), n in counts.items() if target == "sketch" and v == Verdict.EQUAL) \
        < 0.2 * 6 * STUDIES  # fmt: skip


def test_the_page_of_a_simulated_study(tmp_path):
    """Report B's headline, +7.9 on cartoon and -14.9 on photo, is found per target by five seeds."""
    built = report_of(write_suite(tmp_path / "s", SUITE, accuracy_of()))
    assert built.audit.passes
    found = {
        c.target: c
        for c in built.comparisons.primary
        if c.name == "random-conv1-p0.7 minus baseline"
    }
    assert found["cartoon"].verdict == Verdict.HIGHER and found["photo"].verdict == Verdict.LOWER
    for target, effect in EFFECTS["random-conv1-p0.7"].items():
        e = found[target].estimate
        assert abs(e.mean - effect) < 3 * e.error
    (sentence,) = [s for s in built.main if s.startswith("random-conv1-p0.7 minus baseline")]
    assert "cartoon +" in sentence and "photo −" in sentence
    outcomes = {c.number: str(c.outcome) for c in built.claims}
    sure = {"B13": "contradicted", "B15": "holds", "B15-photo": "contradicted", "A8": "holds"}
    sure |= {"B19": "contradicted", "A9": "cannot be decided"}
    assert {number: outcomes[number] for number in sure} == sure
