"""Choosing an arm without target labels, over the arms of a table."""

import numpy as np
import pytest
from domainshift.report import choices
from domainshift.report.choices import choices_of
from domainshift.report.render import markdown, page
from domainshift.report.study import read_study
from domainshift.selection import Inputs
from made_records import EXACT, exact, report_of, write_suite


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("choices") / "small", EXACT, exact)


def confident(share):
    """Logits of 100 images over 7 classes, that `share` of the images are sure of."""
    logits = np.zeros((100, 7), dtype=np.float16)
    sure = np.arange(int(100 * share))
    logits[sure, sure % 7] = 20
    return logits


SHARES = {"baseline": 0.2, "random": 0.5, "da": 0.8}  # the best arm, random, is not the surest


def test_a_row_for_each_validator_and_target(folder, monkeypatch):
    by_mode = lambda result: Inputs(target_logits=confident(SHARES[result.training.mode]))  # noqa: E731
    monkeypatch.setattr(choices, "inputs_of", by_mode)
    rows, notes = choices_of(read_study(folder))
    assert {(row.pair[1], row.validator) for row in rows} == {
        (target, title)
        for target in ("cartoon", "sketch")
        for title in ("InfoMax (IM)", "Batch nuclear norm (BNM)", "Soft Neighborhood Density (SND)")
    }
    row = next(r for r in rows if r.validator.startswith("InfoMax") and r.pair[1] == "cartoon")
    assert row.chosen == ("da", 3) and row.accuracy == pytest.approx(40)  # 40, 42 and 38
    assert row.oracle == ("random", 3) and row.oracle_accuracy == pytest.approx(44 + 2 / 3)
    # ranks of the accuracies: by seed (1.5, 3, 1.5), (1, 3, 2), (2, 3, 1); of the scores 1, 2, 3
    assert row.correlation == pytest.approx((0 + 0.5 - 0.5) / 3)
    assert (row.seeds, row.arms) == (3, 3)
    assert notes == [
        "Held-out source accuracy and Deep Embedded Validation (DEV): not here, because not every arm "
        "has predictions on held-out source images."
    ]


def test_without_held_out_images_two_validators_are_missing(tmp_path):
    folder = write_suite(tmp_path / "s", EXACT.replace(", holdout: 0.1", ""), exact)
    rows, (note,) = choices_of(read_study(folder))
    assert len({row.validator for row in rows}) == 3
    assert note == (
        "Held-out source accuracy and Deep Embedded Validation (DEV): not here, because no source "
        "image is held out (holdout 0)."
    )


def test_held_out_images_give_all_validators(folder):
    rows, notes = choices_of(read_study(folder))
    assert len({row.validator for row in rows}) == 5 and notes == []


def test_a_seed_that_lacks_an_arm_does_not_count(tmp_path):
    folder = write_suite(tmp_path / "s", EXACT, exact, without=[("da", "cartoon", 1)])
    rows, _ = choices_of(read_study(folder))
    assert {(row.pair[1], row.seeds) for row in rows} == {("cartoon", 2), ("sketch", 3)}


def test_two_arms_are_no_choice(tmp_path):
    text = EXACT.replace("      da: {mode: da, layers: [4]}\n", "").replace(", [da, baseline]", "")
    assert choices_of(read_study(write_suite(tmp_path / "s", text, exact))) == ([], [])


def test_predictions_that_cannot_be_read_are_no_candidates(tmp_path):
    folder = write_suite(tmp_path / "s", EXACT, exact)
    study = read_study(folder)
    for path in folder.glob("da-*/evaluations/cartoon.npz"):
        path.write_bytes(b"no archive")
    rows, notes = choices_of(study)
    assert {row.pair[1] for row in rows} == {"sketch"}
    assert notes == ["3 of 18 runs not scored: their predictions are not kept or cannot be read."]


def test_a_page_without_predictions_says_why_nothing_is_chosen(tmp_path):
    folder = write_suite(tmp_path / "s", EXACT, exact)
    study = read_study(folder)
    for path in folder.glob("*/evaluations/*.npz"):
        path.unlink()
    rows, notes = choices_of(study)
    assert rows == [] and notes[0].startswith("18 of 18 runs not scored")


def test_the_page_names_the_oracle_for_what_it_is(folder):
    text = page(report_of(folder))
    part = text.split('id="choices"')[1].split("</section>")[0]
    assert "Oracle: chosen by target labels, no result" in part and "InfoMax" in part


def test_pairs_of_several_sources_are_named(tmp_path, monkeypatch):
    by_mode = lambda result: Inputs(target_logits=confident(SHARES[result.training.mode]))  # noqa: E731
    monkeypatch.setattr(choices, "inputs_of", by_mode)
    text = EXACT.replace("sources: [art_painting]", "sources: [art_painting, photo]")
    built = report_of(write_suite(tmp_path / "s", text, exact))
    assert "| shaping | photo → cartoon | InfoMax (IM) |" in markdown(built)
    assert "| Table | Source → target | Validator |" in markdown(built)
    assert '<td class="">art_painting → sketch</td>' in page(built)
