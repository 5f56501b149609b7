"""Tests of a network: what they count, on which statistics, and that they leave no trace."""

import numpy as np
import pytest
import torch
from domainshift.config import Test
from domainshift.errors import NonFiniteError
from domainshift.methods import Method
from domainshift.models import state_digest
from domainshift.records import results
from domainshift.records.schema import CHECKPOINT, METRICS
from domainshift.training import evaluation
from domainshift.training.evaluation import count_of, evaluate, evaluate_all
from domainshift.training.run import build
from tiny_runs import (
    SHAPED,
    TOTAL,
    quiet,
    rows_of,
    run,
    same_tensors,
    setup_of,
    state_of,
    untimed,
    weights_of,
)
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("no_pictures")


def built(tmp_path, **switches):
    setup = setup_of(**switches)
    experiment = build(setup, setup.config.tests(), None, tmp_path)
    return experiment.method, experiment.sets


def test_a_nan_while_batch_norm_is_measured_names_epoch_and_test(tmp_path, monkeypatch):
    """Where it first appears then, after a whole epoch of finite numbers."""
    own = Method.recalibrate

    def poisoned(self, batches):
        own(self, (images * float("nan") for images in batches))

    monkeypatch.setattr(Method, "recalibrate", poisoned)
    expected = (
        "^test sketch-shaping-on-bn-source after epoch 1, while BatchNorm is measured: layer 'conv1': "
        r"\d+ of \d+ values of its output are not finite"
    )
    with pytest.raises(NonFiniteError, match=expected):
        run(tmp_path / "r", **SHAPED["random"], epochs=1)
    assert not (tmp_path / "r" / METRICS).exists()


# --- predictions ---


def test_every_image_is_predicted_once_in_the_order_of_the_data(tmp_path, monkeypatch):
    method, sets = built(tmp_path)
    monkeypatch.setattr(evaluation, "BATCH", 8)  # the last of three batches is smaller
    before = {name: t.clone() for name, t in method.model.state_dict().items()}
    predictions = evaluate(method, Test(domain="sketch"), sets, 1, quiet())

    domain, _ = sets.of(Test(domain="sketch"))
    dataset = evaluation.UnlabelledImages(
        domain.images, range(TOTAL), evaluation.test_transform(32)
    )
    images = torch.stack([dataset[i] for i in range(TOTAL)])
    method.model.eval()
    with torch.no_grad():
        logits = torch.cat([method.model(batch) for batch in images.split(8)])
    assert predictions.labels.tolist() == domain.labels.tolist()
    assert predictions.predicted.tolist() == logits.argmax(1).tolist()
    assert predictions.logits.dtype == predictions.features.dtype == np.float16
    np.testing.assert_array_equal(predictions.logits, logits.half().numpy())
    loss_of_each = F.cross_entropy(
        logits.double(), torch.from_numpy(domain.labels), reduction="none"
    )
    assert predictions.loss == pytest.approx(float(loss_of_each.mean()), rel=1e-12)
    parts = loss_of_each.split(sets.config.batch_size)
    in_batches = sum(float(part.mean()) for part in parts) / TOTAL
    assert predictions.batch_loss == pytest.approx(in_batches, rel=1e-12)
    count = count_of(predictions)
    correct = int((logits.argmax(1).numpy() == domain.labels).sum())
    assert (count.correct, count.total) == (correct, TOTAL)
    after = method.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_features_are_the_input_of_the_classifier(tmp_path):
    method, sets = built(tmp_path)
    predictions = evaluate(method, Test(domain="sketch"), sets, 1, quiet())
    classifier = [m for m in method.model.modules() if isinstance(m, nn.Linear)][-1]
    features = torch.from_numpy(predictions.features).float()
    logits = features @ classifier.weight.detach().T + classifier.bias.detach()
    torch.testing.assert_close(
        logits, torch.from_numpy(predictions.logits).float(), rtol=1e-2, atol=1e-2
    )


def test_tests_of_the_source_are_on_their_own_part_of_it(tmp_path):
    method, sets = built(tmp_path, holdout=0.3, test_set="source-train")
    source = sets.of(Test(domain="art_painting"))[0]
    for images, indices in (("holdout", sets.held_out), ("train", sets.trained)):
        test = Test(domain="art_painting", images=images)
        predictions = evaluate(method, test, sets, 1, quiet())
        assert predictions.labels.tolist() == source.labels[indices].tolist()
    assert sorted([*sets.held_out, *sets.trained]) == list(range(TOTAL))


def test_no_graph_is_kept(tmp_path, monkeypatch):
    method, sets = built(tmp_path)
    predict, grad = Method.predict, []

    def seen(*arguments):
        prediction = predict(*arguments)
        grad.append(prediction.logits.requires_grad or torch.is_grad_enabled())
        return prediction

    monkeypatch.setattr(Method, "predict", seen)
    evaluate(method, Test(domain="sketch"), sets, 1, quiet())
    assert grad == [False]


# --- statistics ---


def first_norm(method):
    return next(m for m in method.model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("bn", ("source", "target"))
def test_statistics_are_those_of_the_asked_images(tmp_path, monkeypatch, bn):
    """Whole batches, in mixed order, without augmentation; put back after the test."""
    method, sets = built(tmp_path, holdout=0)
    trained = first_norm(method).running_mean.clone()
    means, predict = [], Method.predict

    def seen(self, *arguments):
        means.append(first_norm(self).running_mean.clone())
        return predict(self, *arguments)

    monkeypatch.setattr(Method, "predict", seen)
    test = Test(domain="sketch", bn=bn)
    evaluate(method, test, sets, 1, quiet())
    images, indices = sets.statistics_images(test)
    batches = list(evaluation.mixed_batches(images, indices, sets.config))
    assert [len(batch) for batch in batches] == [8, 8]  # 21 images: the last 5 are left out
    conv = method.model.conv1
    with torch.no_grad():
        maps = [conv(batch) for batch in batches]
    expected = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(means[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(first_norm(method).running_mean, trained)
    own = sets.data.load("sketch" if bn == "target" else "art_painting", 3)
    assert images is own.images or np.array_equal(images, own.images)


def test_source_statistics_are_measured_once_for_all_tests(tmp_path, monkeypatch):
    method, sets = built(tmp_path, holdout=0.3)
    measured, recalibrate = [], Method.recalibrate

    def counting(self, batches):
        measured.append(1)
        recalibrate(self, batches)

    monkeypatch.setattr(Method, "recalibrate", counting)
    tests = [Test(domain=d, bn="source") for d in ("sketch", "cartoon", "photo")]
    tests.append(Test(domain="art_painting", images="holdout", bn="source"))
    assert len(list(evaluate_all(method, tests, sets, 1, quiet()))) == 4
    assert len(measured) == 1


def test_maps_of_tests_are_a_function_of_epoch_and_test(tmp_path):
    """Not of the other tests, nor of their order, nor of the draws before."""
    method, sets = built(tmp_path, **SHAPED["random"])
    tests = [
        Test(domain=domain, at_eval=at_eval, bn=bn)
        for domain in ("sketch", "photo")
        for at_eval in ("off", "on")
        for bn in ("trained", "source")
    ]
    together = dict(evaluate_all(method, tests, sets, 1, quiet()))
    torch.rand(7)
    for test in reversed(tests):
        alone = evaluate(method, test, sets, 1, quiet())
        np.testing.assert_array_equal(alone.logits, together[test].logits)
    later = evaluate(method, tests[2], sets, 2, quiet())
    assert tests[2].at_eval == "on" and not np.array_equal(later.logits, together[tests[2]].logits)


def test_a_test_draws_from_no_stream_of_the_program(tmp_path):
    method, sets = built(tmp_path, **SHAPED["random"])
    before = torch.get_rng_state()
    evaluate(method, Test(domain="sketch", at_eval="on", bn="source"), sets, 1, quiet())
    assert torch.equal(torch.get_rng_state(), before)


# --- no trace in training ---


@pytest.mark.parametrize(
    ("mode", "tested"),
    [
        ("baseline", {"bn_at_test": "source"}),
        ("baseline", {"bn_at_test": "target", "target": ["sketch", "cartoon"]}),
        ("da", {"bn_at_test": "source"}),  # whose target pass reads the statistics
        ("random", {"at_eval": "on"}),  # whose tests draw maps
        ("random", {"at_eval": "on", "bn_at_test": "source", "test_set": "source-train"}),
    ],
)
def test_testing_leaves_no_trace(mode, tested, tmp_path):
    """Tested after each epoch in one way, and once in another: the same weights, bit for bit."""
    plain = {"mode": mode, "bn_at_test": "trained", "holdout": 0.1}
    a = run(tmp_path / "last", **plain)
    b = run(tmp_path / "each", **plain | tested, evaluate="each")
    assert [len(row["tests"]) > 0 for row in rows_of(a)] == [False, True]
    assert all(row["tests"] for row in rows_of(b))
    assert rows_of(a)[-1]["tests"] != rows_of(b)[-1]["tests"]
    rows = [[row | {"tests": None} for row in untimed(rows_of(folder))] for folder in (a, b)]
    assert rows[0] == rows[1]
    assert same_tensors(state_of(a), state_of(b))


# --- one training, many tests ---


@pytest.mark.parametrize("mode", ("baseline", "random"))
def test_one_training_with_several_tests_equals_separate_runs(mode, tmp_path):
    shaping = SHAPED.get(mode, {}) | {"mode": mode, "epochs": 1, "holdout": 0.1}
    targets = ["sketch", "cartoon", "photo"]
    together = run(tmp_path / "together", **shaping, target=targets)
    for target in targets:
        alone = run(tmp_path / target, **shaping, target=[target])
        assert same_tensors(state_of(together), state_of(alone))
        name = setup_of(**shaping, target=[target]).config.tests()[0].name
        a, b = (results.read_evaluation(folder, name) for folder in (together, alone))
        assert (a.confusion, a.loss, a.predictions) == (b.confusion, b.loss, b.predictions)


def test_later_tests_equal_those_of_the_training(tmp_path):
    """A finished training is tested from its checkpoint, in the same way as after its last epoch."""
    at_once = run(tmp_path / "at-once", **SHAPED["random"], target=["sketch", "cartoon"])
    later = run(tmp_path / "later", **SHAPED["random"], target=["sketch"])
    before = (later / CHECKPOINT).read_bytes()
    run(later, resume=True, **SHAPED["random"], target=["cartoon"])
    assert (later / CHECKPOINT).read_bytes() == before
    names = results.evaluation_names(at_once)
    assert names == results.evaluation_names(later)
    for name in names:
        a, b = (results.read_evaluation(folder, name) for folder in (at_once, later))
        assert (a.confusion, a.predictions, a.features) == (b.confusion, b.predictions, b.features)


def test_adabn_is_a_test_of_the_baseline(tmp_path):
    folder = run(tmp_path / "r", bn_at_test="trained", epochs=1)
    before = (folder / CHECKPOINT).read_bytes()
    run(folder, resume=True, mode="adabn", epochs=1)
    assert (folder / CHECKPOINT).read_bytes() == before
    assert "sketch-bn-target" in results.evaluation_names(folder)
    alone = run(tmp_path / "adabn", mode="adabn", epochs=1)
    assert results.read_training(alone).record.mode == "baseline"
    a, b = (results.read_evaluation(f, "sketch-bn-target") for f in (folder, alone))
    assert (a.confusion, a.predictions) == (b.confusion, b.predictions)


def test_weights_are_those_of_the_checkpoint(tmp_path):
    folder = run(tmp_path / "r", epochs=1)
    digest = state_digest(weights_of(folder))
    assert results.read_training(folder).record.weights_digest == digest
    assert results.read_evaluation(folder, "sketch-bn-source").weights_digest == digest
