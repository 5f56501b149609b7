"""Validators against values worked out by hand, closed forms and two published implementations."""

import math
import subprocess
import sys
import tracemalloc
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from domainshift.errors import BadInput
from domainshift.selection import (
    VALIDATORS,
    Inputs,
    Selection,
    SelectionError,
    Validator,
    bnm,
    choice,
    control_variate_risk,
    dev,
    domain_weights,
    held_out_accuracy,
    infomax,
    neighborhood_density,
    rank_correlation,
    select,
    snd,
)
from scipy import special

CLASSES = 7
CONFIDENT = 1000.0  # a logit whose softmax is 1 in double precision
OF_TARGET = (infomax, bnm, snd)


def answers(classes, count=CLASSES, confidence=CONFIDENT):
    """Logits of confident answers."""
    return confidence * np.eye(count)[np.asarray(classes)]


def balanced(each=10, count=CLASSES):
    return answers(np.repeat(np.arange(count), each), count)


def drawn(n=200, count=CLASSES, seed=0, scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal((n, count))


def logits_of(p):
    return np.log(np.asarray(p))


# --- held-out accuracy ------------------------------------------------------------------------


def test_held_out_accuracy_by_hand():
    logits = [[2, 1, 0], [0, 3, 1], [1, 1, 0], [0, 0, 1], [5, 4, 6]]
    assert held_out_accuracy(logits, [0, 1, 0, 0, 1]) == pytest.approx(60)  # equal: the first
    assert held_out_accuracy(logits, [0, 1, 0, 2, 2]) == 100
    assert held_out_accuracy(logits, [1, 2, 1, 0, 0]) == 0


# --- InfoMax ----------------------------------------------------------------------------------


def test_uniform_answers_tell_nothing():
    assert infomax(np.zeros((12, CLASSES))) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("count", [2, 3, 7, 31])
def test_confident_balanced_answers_tell_the_class(count):
    assert infomax(balanced(count=count)) == pytest.approx(math.log(count), abs=1e-12)


def test_a_constant_confident_answer_tells_nothing_and_has_the_least_entropy():
    """Why mean entropy is not offered alone."""
    constant, better = answers([3] * 20), drawn(20)
    p = special.softmax(constant, axis=1)
    assert special.entr(p).sum(1).mean() == 0 < special.entr(special.softmax(better, axis=1)).min()
    assert infomax(constant) == 0 < infomax(better)
    assert not any("entropy" in name for name in VALIDATORS)


def test_infomax_by_hand():
    # answers (3/4, 1/4) and (1/4, 3/4): mean (1/2, 1/2), so log 2 minus H(1/4)
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    logits = logits_of([[0.75, 0.25], [0.25, 0.75]])
    assert infomax(logits) == pytest.approx(math.log(2) - entropy)


# --- BNM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [1, 2, 50])
def test_bnm_of_confident_balanced_answers_is_the_greatest(each):
    assert bnm(balanced(each)) == pytest.approx(1)


def test_bnm_of_confident_answers_is_a_sum_of_roots():
    """The columns are orthogonal, and their lengths are the roots of the counts."""
    counts = [9, 4, 1]
    logits = answers(np.repeat([0, 1, 2], counts), 3)
    assert bnm(logits) == pytest.approx((3 + 2 + 1) / math.sqrt(14 * 3))


def test_bnm_of_the_two_useless_models():
    assert bnm(np.zeros((40, CLASSES))) == pytest.approx(1 / CLASSES)
    assert bnm(answers([2] * 40)) == pytest.approx(1 / math.sqrt(CLASSES))


def test_bnm_does_not_depend_on_the_number_of_images():
    assert bnm(np.tile(drawn(), (5, 1))) == pytest.approx(bnm(drawn()))


def test_bnm_ranks_as_the_published_loss():
    models = [drawn(seed=seed, scale=0.5 + seed) for seed in range(6)]
    published = [-np.linalg.norm(special.softmax(m, axis=1), "nuc") / len(m) for m in models]
    assert np.argsort([bnm(m) for m in models]).tolist() == np.argsort(published)[::-1].tolist()


# --- SND --------------------------------------------------------------------------------------


def test_density_by_hand():
    """Three unit vectors with inner products 0 (a, b), 0.6 (a, c) and 0.8 (b, c), temperature 0.2."""

    def entropy(difference):  # of two neighbours whose scores differ
        p = 1 / (1 + math.exp(-difference))
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    expected = (entropy(0.6 / 0.2) + entropy(0.8 / 0.2) + entropy(0.2 / 0.2)) / 3
    vectors = [[2, 0], [0, 0.5], [3, 4]]  # lengths do not count
    assert neighborhood_density(vectors, temperature=0.2) == pytest.approx(expected)


def test_tight_clusters_are_denser_than_scattered_answers():
    generator = np.random.default_rng(1)
    tight = balanced(20) / CONFIDENT * 6 + 0.1 * generator.standard_normal((140, CLASSES))
    assert snd(tight) > snd(drawn(140)) + 0.4
    # clusters of k images that are apart: k - 1 equal neighbours each
    assert snd(balanced(20)) == pytest.approx(math.log(19), abs=1e-5)


def test_the_failure_of_snd_is_as_described():
    """One answer to all images is the densest of all, and among the worst of infomax and bnm."""
    collapsed, good = answers([4] * 50), balanced()
    assert snd(collapsed) == pytest.approx(math.log(49)) and snd(collapsed) > snd(good)
    assert infomax(collapsed) < infomax(good) and bnm(collapsed) < bnm(good)


@pytest.mark.parametrize("block", [1, 7, 64, 199, 200, 1000])
def test_the_block_does_not_change_density(block):
    vectors = drawn(200)
    assert neighborhood_density(vectors, block=block) == pytest.approx(
        neighborhood_density(vectors, block=200), rel=1e-12
    )


def test_density_is_that_of_the_whole_matrix():
    vectors = drawn(90, seed=5)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = (unit @ unit.T / 0.05)[~np.eye(90, dtype=bool)].reshape(90, 89)
    expected = special.entr(special.softmax(scores, axis=1)).sum(1).mean()
    assert neighborhood_density(vectors) == pytest.approx(expected, rel=1e-12)


def test_density_of_a_whole_domain_fits_in_memory():
    logits = drawn(3929)  # the sketches of PACS; all similarities at once are 123 MB
    tracemalloc.start()
    score = snd(logits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32e6
    assert 0 < score < math.log(3928)


def test_a_vector_of_length_zero_is_no_error():
    # to (0, 0) both others are equally like; the others prefer each other, exp(20) to 1
    p = 1 / (1 + math.exp(-20))
    other = -p * math.log(p) - (1 - p) * math.log1p(-p)
    vectors = [[0, 0], [1, 0], [2, 0]]
    assert neighborhood_density(vectors) == pytest.approx((math.log(2) + 2 * other) / 3, rel=1e-9)


# --- DEV --------------------------------------------------------------------------------------


def test_the_control_variate_step_by_step():
    weights, losses = [Fraction(1, 2), Fraction(1), Fraction(3)], [0, 0, 1]
    weighted = [w * loss for w, loss in zip(weights, losses, strict=True)]  # 0, 0, 3
    mean_w, mean_wl = sum(weights) / 3, sum(weighted) / 3
    assert (mean_w, mean_wl) == (Fraction(3, 2), 1)
    pairs = list(zip(weights, weighted, strict=True))
    covariance = sum((w - mean_w) * (wl - mean_wl) for w, wl in pairs) / 2
    variance = sum((w - mean_w) ** 2 for w in weights) / 2
    assert (covariance, variance) == (Fraction(9, 4), Fraction(7, 4))
    eta = -covariance / variance
    risk = mean_wl + eta * mean_w - eta
    assert (eta, risk) == (Fraction(-9, 7), Fraction(5, 14))
    assert control_variate_risk([float(w) for w in weights], losses) == pytest.approx(5 / 14)


def test_equal_losses_are_the_risk_whatever_the_weights():
    weights = np.random.default_rng(2).gamma(0.3, size=50)
    assert control_variate_risk(weights, np.full(50, 0.7)) == pytest.approx(0.7)


@pytest.mark.parametrize("noise", [0, 1e-16])
def test_equal_weights_have_no_control_variate(noise):
    weights = 1.25 + noise * np.arange(4)
    assert control_variate_risk(weights, [1, 0, 0, 1]) == pytest.approx(1.25 / 2)


def test_weights_of_domains_that_no_column_tells_apart_are_one():
    weights = domain_weights(np.full((30, 2), 0.1), np.full((50, 2), 0.1), np.full((4, 2), 0.1))
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


def test_the_domain_classifier_is_at_its_optimum():
    """Without a penalty on the intercept, the expected number of target rows is their number."""
    generator = np.random.default_rng(3)
    source, target = generator.standard_normal((80, 5)), generator.standard_normal((120, 5)) + 0.5
    both = np.concatenate((source, target))
    odds = domain_weights(source, target, both) * 120 / 80
    p = odds / (1 + odds)
    assert p.sum() == pytest.approx(120, abs=1e-4)
    # and along each standardized column the slope of the loss is minus the coefficient
    columns = (both - both.mean(0)) / both.std(0)
    labels = np.repeat([0, 1], [80, 120])
    coefficients = np.linalg.lstsq(np.c_[columns, np.ones(200)], np.log(odds), rcond=None)[0][:5]
    np.testing.assert_allclose(columns.T @ (labels - p), coefficients, atol=1e-4)


def test_weights_are_the_ratio_of_densities():
    """Normal densities of variance 1 and means 0 and 1: the ratio at x is exp(x - 1/2)."""
    generator = np.random.default_rng(4)
    source, target = generator.standard_normal((20_000, 1)), generator.normal(1, 1, (10_000, 1))
    at = np.linspace(-2, 2, 9)[:, None]
    expected = np.exp(at[:, 0] - 0.5)
    np.testing.assert_allclose(domain_weights(source, target, at), expected, rtol=0.1)


def threshold_model(x):
    """Logits and labels of a model that is wrong where x > 1."""
    labels = np.zeros(len(x), dtype=np.int64)
    return answers((x[:, 0] > 1).astype(int), 2), labels


def normal(mean, n, seed):
    return np.random.default_rng(seed).normal(mean, 1, (n, 1))


def test_without_a_shift_dev_is_minus_the_source_risk():
    source = normal(0, 4000, 5)
    logits, labels = threshold_model(source)
    risk = 1 - held_out_accuracy(logits, labels) / 100
    assert risk == pytest.approx(0.1587, abs=0.02)  # P(x > 1) of a standard normal
    assert dev(logits, labels, source, normal(0, 4000, 6)) == pytest.approx(-risk, abs=0.02)


@pytest.mark.parametrize(("mean", "risk"), [(1.0, 0.5), (-1.0, 0.0228), (0.5, 0.3085)])
def test_dev_corrects_a_known_shift(mean, risk):
    """The target's risk is P(x > 1) of a normal with another mean; the source's is 0.16."""
    source, target = normal(0, 20_000, 7), normal(mean, 20_000, 8)
    logits, labels = threshold_model(source)
    assert dev(logits, labels, source, target) == pytest.approx(-risk, abs=0.03)
    trained = normal(0, 20_000, 9)  # the classifier fitted on training images
    assert dev(logits, labels, source, target, trained) == pytest.approx(-risk, abs=0.03)


def test_dev_of_one_kind_of_errors_is_exact():
    source, target = normal(0, 50, 10), normal(2, 60, 11)
    labels = np.zeros(50, dtype=int)
    assert dev(answers(labels, 2), labels, source, target) == pytest.approx(0, abs=1e-12)
    assert dev(answers(labels + 1, 2), labels, source, target) == pytest.approx(-1)


def test_dev_takes_logits_in_place_of_features():
    held_out, target = drawn(60, seed=12), drawn(80, seed=13)
    labels = np.arange(60) % CLASSES
    assert math.isfinite(dev(held_out, labels, held_out, target))


def test_domains_that_are_far_apart_give_a_finite_score():
    source, target = normal(0, 50, 10), normal(1000, 60, 11)
    logits, labels = threshold_model(source)
    assert math.isfinite(dev(logits, labels, source, target))


def test_dev_does_not_depend_on_the_unit_of_a_feature():
    source, target = drawn(90, 4, 14), drawn(70, 4, 15) + 1
    logits, labels = drawn(90, seed=16), np.arange(90) % CLASSES
    unit = np.array([1.0, 1000.0, 1e-3, 7.0])
    assert dev(logits, labels, source * unit + 5, target * unit + 5) == pytest.approx(
        dev(logits, labels, source, target), abs=1e-6
    )


# --- what does not change a score -------------------------------------------------------------


@pytest.mark.parametrize("validator", OF_TARGET)
def test_scores_do_not_depend_on_the_order_of_images_and_classes(validator):
    logits, generator = drawn(), np.random.default_rng(17)
    expected = pytest.approx(validator(logits), rel=1e-12)
    assert validator(logits[generator.permutation(200)]) == expected
    assert validator(logits[:, generator.permutation(CLASSES)]) == expected
    assert validator(logits + generator.standard_normal((200, 1))) == expected  # softmax


def test_dev_and_accuracy_do_not_depend_on_the_order_of_images_and_classes():
    generator = np.random.default_rng(18)
    logits, labels = drawn(150, seed=19), generator.integers(CLASSES, size=150)
    features, target = drawn(150, 6, 20), drawn(110, 6, 21) + 0.5
    images, classes = generator.permutation(150), generator.permutation(CLASSES)
    names = np.argsort(classes)  # where each class went
    permuted = logits[images][:, classes], names[labels[images]]
    assert held_out_accuracy(*permuted) == held_out_accuracy(logits, labels)
    assert dev(*permuted, features[images], target[generator.permutation(110)]) == pytest.approx(
        dev(logits, labels, features, target), abs=1e-6
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("validator", OF_TARGET)
def test_half_precision_is_computed_in_double(validator, dtype):
    logits = drawn().astype(dtype)
    assert validator(logits) == validator(logits.astype(np.float64))


def test_the_same_arrays_give_the_same_score():
    inputs = complete(0)
    for validator in VALIDATORS.values():
        assert validator.score(inputs) == validator.score(inputs)


def test_arrays_are_not_written_to():
    inputs = complete(1)
    before = {name: getattr(inputs, name).copy() for name in vars(inputs)}
    for validator in VALIDATORS.values():
        validator.score(inputs)
    for name, array in before.items():
        np.testing.assert_array_equal(array, getattr(inputs, name))


# --- what is refused --------------------------------------------------------------------------

NAN = np.array([[0.0, np.nan], [1.0, 0.0]])


@pytest.mark.parametrize("validator", OF_TARGET)
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (NAN, r"target_logits: nan \(1 of 4 values\) is not allowed; allowed: finite values"),
        ([[0.0, np.inf], [0, 0]], "target_logits: inf .* finite"),
        (np.empty((0, 7)), r"target_logits: shape \(0, 7\) is not allowed; allowed: \(n, k\)"),
        ([], r"target_logits: shape \(0,\)"),
        (np.zeros(7), r"target_logits: shape \(7,\)"),
        (np.zeros((4, 1)), r"target_logits: shape \(4, 1\) .* k >= 2"),
        (np.zeros((2, 3, 4)), r"target_logits: shape \(2, 3, 4\)"),
        (np.array([["a", "b"]]), "target_logits: dtype <U1 is not allowed; allowed: real"),
        (np.zeros((3, 2), complex), "target_logits: dtype complex128"),
    ],
)
def test_logits_that_are_refused(validator, logits, message):
    with pytest.raises(SelectionError, match=message):
        validator(logits)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0], r"held_out_labels: shape \(1,\) is not allowed; allowed: \(2,\)"),
        ([0.0, 1.0], "held_out_labels: dtype float64 is not allowed; allowed: integers"),
        ([0, 2], "held_out_labels: class 2 is not allowed; allowed: 0 to 1"),
        ([-1, 1], "held_out_labels: class -1"),
    ],
)
def test_labels_that_are_refused(labels, message):
    with pytest.raises(SelectionError, match=message):
        held_out_accuracy(np.eye(2), labels)
    with pytest.raises(SelectionError, match=message):
        dev(np.eye(2), labels, np.eye(2), np.eye(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out_logits": NAN}, "held_out_logits: nan"),
        ({"held_out_features": NAN}, "held_out_features: nan"),
        ({"held_out_features": np.eye(3)}, "held_out_features: 3 rows .* 2, as held_out_logits has"),
        ({"target_features": np.ones((3, 5))}, "target_features: 5 columns .* 2, as held_out_f"),
        ({"target_features": np.empty((0, 2))}, r"target_features: shape \(0, 2\)"),
        ({"source_features": np.ones((3, 5))}, "source_features: 5 columns"),
        ({"source_features": NAN}, "source_features: nan"),
        ({"penalty": 0}, "penalty: 0 is not allowed; allowed: above 0"),
        ({"penalty": math.nan}, "penalty: nan"),
    ],
)  # fmt: skip
def test_what_dev_refuses(change, message):
    arguments = {
        "held_out_logits": np.eye(2),
        "held_out_labels": [0, 1],
        "held_out_features": np.eye(2),
        "target_features": np.eye(2),
    }
    with pytest.raises(SelectionError, match=message):
        dev(**arguments | change)


def test_one_image_has_no_variance_and_no_neighbour():
    with pytest.raises(SelectionError, match=r"held_out_features: shape \(1, 2\) .* n >= 2"):
        dev(np.eye(2)[:1], [0], np.eye(2)[:1], np.eye(2))
    with pytest.raises(SelectionError, match=r"target_logits: shape \(1, 2\) .* n >= 2"):
        snd([[1.0, 2.0]])
    with pytest.raises(SelectionError, match=r"weights: shape \(1,\)"):
        control_variate_risk([1.0], [1.0])
    with pytest.raises(SelectionError, match="losses: 3 values .* 2, one per weight"):
        control_variate_risk([1.0, 2.0], [1.0, 0.0, 1.0])


@pytest.mark.parametrize("option", [{"temperature": 0}, {"temperature": math.inf}, {"block": 0}])
def test_options_of_density_that_are_refused(option):
    (name,) = option
    with pytest.raises(SelectionError, match=f"{name}: .* is not allowed; allowed: "):
        neighborhood_density(np.eye(3), **option)


def test_errors_are_bad_input():
    assert issubclass(SelectionError, BadInput) and issubclass(SelectionError, ValueError)


# --- the registry -----------------------------------------------------------------------------


def complete(seed, quality=1.0, n=70):
    """Inputs of a model that is the better the higher its quality."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES

    def logits():
        return quality * np.eye(CLASSES)[labels] * 4 + generator.standard_normal((n, CLASSES))

    return Inputs(
        target_logits=logits(),
        target_features=generator.standard_normal((n, 5)) + 0.3,
        held_out_logits=logits(),
        held_out_labels=labels,
        held_out_features=generator.standard_normal((n, 5)),
        source_features=generator.standard_normal((2 * n, 5)),
    )


def without(inputs, *names):
    return Inputs(**{k: v for k, v in vars(inputs).items() if k not in names})


def test_the_registry_is_complete():
    assert list(VALIDATORS) == ["held-out", "im", "bnm", "snd", "dev"]
    for name, validator in VALIDATORS.items():
        assert validator.name == name and validator.title and validator.unit
        assert set(validator.needs + validator.uses) <= set(vars(Inputs()))
        assert validator.source or name == "held-out"
        number = validator.source.rpartition("arXiv ")[2]
        assert not validator.source or number in validator.function.__doc__
        assert validator.lacks(complete(0)) == []
        assert math.isfinite(validator.score(complete(0)))


def test_a_score_is_that_of_the_function():
    inputs = complete(3)
    of_held_out = (inputs.held_out_logits, inputs.held_out_labels)
    features = inputs.held_out_features, inputs.target_features, inputs.source_features
    assert VALIDATORS["held-out"].score(inputs) == held_out_accuracy(*of_held_out)
    assert VALIDATORS["im"].score(inputs) == infomax(inputs.target_logits)
    assert VALIDATORS["dev"].score(inputs) == dev(*of_held_out, *features)
    less = without(inputs, "source_features")  # used, not needed
    assert VALIDATORS["dev"].score(less) == dev(*of_held_out, *features[:2])


def test_what_a_record_lacks_is_named():
    inputs = without(complete(0), "held_out_features", "target_features", "held_out_labels")
    assert VALIDATORS["dev"].lacks(inputs) == [
        "held_out_labels", "held_out_features", "target_features",
    ]  # fmt: skip
    with pytest.raises(SelectionError, match="is not enough for held-out; .*: held_out_labels"):
        VALIDATORS["held-out"].score(inputs)
    with pytest.raises(SelectionError, match="inputs: nothing is not enough for im; .*target_log"):
        VALIDATORS["im"].score(Inputs())


# --- choosing ---------------------------------------------------------------------------------


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 30], [50, 60, 61]) == pytest.approx(1)
    assert rank_correlation([3, 2, 1], [50, 60, 61]) == pytest.approx(-1)
    # squared differences of rank 1, 1, 0, 0: 1 - 6 * 2 / (4 * 15)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(0.8)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(22.5))


def test_a_rank_correlation_that_says_nothing_is_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rank_correlation([1], [2]) is rank_correlation([1, 2], [2, 3]) is None
        assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
        assert rank_correlation([1, 2, 3], [0.3, 0.1 + 0.2, 0.3]) is None  # equal but for rounding


def test_the_first_of_equals_is_chosen():
    assert choice([1.0, 3.0, 2.0, 3.0]) == 1
    assert choice([-5.0]) == 0


@pytest.mark.parametrize("call", [choice, lambda x: rank_correlation(x, x)])
@pytest.mark.parametrize("scores", [[], [1.0, math.nan, 2.0], [[1.0, 2.0]]])
def test_scores_that_are_refused(call, scores):
    with pytest.raises(SelectionError, match="scores: .* is not allowed; allowed: "):
        call(scores)


def test_scores_and_accuracies_are_paired():
    with pytest.raises(SelectionError, match="accuracies: 2 values .* 3, one per score"):
        rank_correlation([1, 2, 3], [1, 2])


def test_selections_by_hand():
    """Held-out accuracies 50, 100 and 0 percent; the answers of b are the most telling ones."""
    right, wrong = answers([0, 1], 2), answers([1, 0], 2)
    half = answers([0, 0], 2)
    labels = np.array([0, 1])
    candidates = {
        "a": (Inputs(target_logits=half, held_out_logits=half, held_out_labels=labels), 40.0),
        "b": (Inputs(target_logits=right, held_out_logits=right, held_out_labels=labels), 50.0),
        "c": (Inputs(target_logits=0 * half, held_out_logits=wrong, held_out_labels=labels), 60.0),
    }
    held, im, norm, density = select(candidates)
    # the scores rank a, b, c as 2, 3, 1, the accuracies as 1, 2, 3: 1 - 6 * (1 + 1 + 4) / 24
    assert held == Selection("held-out", pytest.approx(-0.5), "b", 50.0, "c", 60.0)
    assert held.regret == 10
    assert (im.validator, im.chosen, im.accuracy) == ("im", "b", 50.0)
    assert (norm.validator, norm.chosen) == ("bnm", "b")
    # of two images each has one neighbour: every score is 0, and says nothing
    assert density == Selection("snd", None, "a", 40.0, "c", 60.0)
    assert density.regret == 20


def test_better_models_are_found():
    qualities = {"poor": 0.1, "fair": 0.3, "good": 0.5, "best": 0.8}
    candidates = {
        name: (complete(i, quality), 100 * quality)
        for i, (name, quality) in enumerate(qualities.items())
    }
    selections = {s.validator: s for s in select(candidates)}
    assert list(selections) == list(VALIDATORS)
    for name in ("held-out", "im", "bnm"):
        assert selections[name].chosen == "best" and selections[name].regret == 0
        assert selections[name].correlation > 0.9
    assert {s.oracle for s in selections.values()} == {"best"}


def test_a_validator_is_left_out_where_one_candidate_lacks_its_inputs():
    candidates = {"a": (complete(0), 10.0), "b": (without(complete(1), "target_features"), 20.0)}
    assert [s.validator for s in select(candidates)] == ["held-out", "im", "bnm", "snd"]
    candidates["c"] = (without(complete(2), "target_logits"), 30.0)
    assert [s.validator for s in select(candidates)] == ["held-out"]
    assert select({"a": (Inputs(), 10.0)}) == []


def test_what_a_validator_merely_uses_is_taken_from_all_or_none():
    """Otherwise the scores of DEV would come from two kinds of weights."""
    seen = []
    probe = Validator(
        name="probe",
        title="what reaches a validator",
        function=lambda target_logits, source_features: seen.append(source_features) or 0.0,
        needs=("target_logits",),
        uses=("source_features",),
        unit="",
        source="",
    )
    full = complete(0)
    (selection,) = select({"a": (full, 1.0), "b": (full, 2.0)}, {"probe": probe})
    assert all(each is full.source_features for each in seen) and selection.correlation is None
    seen.clear()
    select({"a": (full, 1.0), "b": (without(full, "source_features"), 2.0)}, {"probe": probe})
    assert seen == [None, None]


def test_target_accuracies_change_no_choice():
    inputs = [complete(i, 1 + i) for i in range(3)]
    by_rank = select({str(i): (each, 10.0 * i) for i, each in enumerate(inputs)})
    reverse = select({str(i): (each, 90 - 10.0 * i) for i, each in enumerate(inputs)})
    assert [s.chosen for s in by_rank] == [s.chosen for s in reverse]
    assert [s.oracle for s in by_rank] != [s.oracle for s in reverse]


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({}, "candidates: none is not allowed; allowed: one or more"),
        ({"a": (complete(0), math.nan)}, "candidate a: accuracy nan .* 0 to 100 percent"),
        ({"a": (complete(0), 101.0)}, "candidate a: accuracy 101"),
        (
            {"a": (complete(0), 1.0), "b": (complete(0, n=14), 1.0)},
            r"candidate b: target_logits of shape \(14, 7\) .* \(70, 7\), as candidate a has",
        ),
        (
            {"a": (Inputs(target_logits=np.eye(2)), 1.0), "b": (Inputs(target_logits=NAN), 1.0)},
            "candidate b: im: target_logits: nan",
        ),
    ],
)
def test_candidates_that_are_refused(candidates, message):
    with pytest.raises(SelectionError, match=message):
        select(candidates)


def test_torch_is_not_needed():
    code = "import sys, domainshift.selection; assert 'torch' not in sys.modules"
    folder = Path(__file__).parents[3] / "experiments"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


# --- published implementations ----------------------------------------------------------------


@pytest.fixture
def adapt():
    """The validators of pytorch-adapt."""
    return pytest.importorskip(
        "pytorch_adapt.validators",
        reason="pytorch-adapt cannot be imported (pip install pytorch-adapt)",
        exc_type=ImportError,
    )


@pytest.fixture
def metrics():
    """The scorers of skada."""
    return pytest.importorskip(
        "skada.metrics", reason="skada cannot be imported (pip install skada)", exc_type=ImportError
    )


MODELS = [drawn(300, seed=seed, scale=scale) for seed, scale in enumerate([0.3, 1.0, 3.0, 9.0])]


@pytest.mark.parametrize("logits", MODELS)
def test_target_validators_agree_with_pytorch_adapt(adapt, logits):
    torch = pytest.importorskip("torch")
    outputs = torch.from_numpy(logits)
    target = {"logits": outputs, "preds": outputs.softmax(1)}
    assert infomax(logits) == pytest.approx(adapt.IMValidator()(target_train=target), rel=1e-6)
    published = adapt.BNMValidator()(target_train=target)  # divides by n
    assert bnm(logits) == pytest.approx(published * math.sqrt(300 / CLASSES), rel=1e-9)
    assert snd(logits) == pytest.approx(adapt.SNDValidator()(target_train=target), rel=1e-6)


def test_the_control_variate_agrees_with_pytorch_adapt(adapt):
    torch = pytest.importorskip("torch")
    from pytorch_adapt.validators.deep_embedded_validator import get_dev_risk

    generator = np.random.default_rng(22)
    weights, losses = generator.gamma(1, size=80), generator.integers(2, size=80).astype(float)
    theirs = get_dev_risk(
        torch.from_numpy(weights)[:, None], torch.from_numpy(losses)[:, None], None
    )
    assert control_variate_risk(weights, losses) == pytest.approx(theirs, rel=1e-9)


def skada_model():
    """A fitted pipeline whose features are its logits."""
    from sklearn.pipeline import Pipeline

    class Model(Pipeline):
        def __init__(self, steps=(("identity", "passthrough"),)):
            super().__init__(list(steps))

        def predict_proba(self, X, **kwargs):
            return special.softmax(X, axis=1)

        def predict_log_proba(self, X, **kwargs):
            return special.log_softmax(X, axis=1)

    return Model()


@pytest.mark.parametrize("logits", MODELS)
def test_snd_agrees_with_skada(metrics, logits):
    """skada gives an image the likelihood exp(-20) of being its own neighbour, instead of none."""
    scorer = metrics.SoftNeighborhoodDensity()
    domains = np.array([1] * 10 + [-2] * 300)
    X = np.concatenate((drawn(10), logits))
    theirs = scorer._score(None, skada_model(), X, np.arange(310) % CLASSES, sample_domain=domains)
    assert snd(logits) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_dev_agrees_with_skada(metrics, seed):
    """With the same split, error and classifier: a logistic regression of standardized columns."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    source, target = drawn(240, seed=seed, scale=1.0), drawn(160, seed=seed + 10, scale=1.2) + 0.2
    labels = np.where(np.arange(240) % 3, source.argmax(1), np.arange(240) % CLASSES)
    scorer = metrics.DeepEmbeddedValidation(
        domain_classifier=make_pipeline(
            StandardScaler(), LogisticRegression(tol=1e-9, max_iter=9999)
        ),
        loss_func=lambda y, p: (p.argmax(1) != y).astype(float)[:, None],
        random_state=seed,
    )
    theirs = scorer._score(
        None,
        skada_model(),
        np.concatenate((source, target)),
        np.concatenate((labels, np.full(160, -1))),
        sample_domain=np.array([1] * 240 + [-2] * 160),
    )
    train, held_out, _, of_held_out = train_test_split(
        source, labels, test_size=0.33, random_state=np.random.RandomState(seed)
    )
    ours = dev(held_out, of_held_out, held_out, target, train)
    assert ours == pytest.approx(theirs, abs=1e-5)
