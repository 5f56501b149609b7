"""Figures are exact counts."""

import numpy as np
import pytest
import torch
from domainshift.records.results import confusion_of, figures
from torchmetrics.functional.classification import multiclass_accuracy

CLASSES = ("cat", "dog", "owl")


def test_figures_by_hand():
    # 4 cats (3 right), 2 dogs (none right), 4 owls (all right)
    result = figures([[3, 1, 0], [1, 0, 1], [0, 0, 4]], CLASSES)
    assert (result["correct"], result["total"], result["accuracy"]) == (7, 10, 70.0)
    assert result["per_class"]["cat"] == {"correct": 3, "total": 4, "accuracy": 75.0}
    assert result["macro_accuracy"] == pytest.approx((75 + 0 + 100) / 3)
    assert result["majority_rate"] == 40.0
    assert not result["collapsed"]


def test_rows_of_a_confusion_are_true_classes():
    labels, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0])
    assert confusion_of(labels, predicted, 3) == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_figures_agree_with_torchmetrics():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 7, (501,), generator=generator)
    predicted = torch.randint(0, 7, (501,), generator=generator)
    result = figures(confusion_of(labels.numpy(), predicted.numpy(), 7), tuple("abcdefg"))
    for average, key in (("micro", "accuracy"), ("macro", "macro_accuracy")):
        expected = multiclass_accuracy(predicted, labels, num_classes=7, average=average)
        assert result[key] == pytest.approx(100 * expected.item(), abs=1e-4)


def test_collapse_is_flagged():
    result = figures(confusion_of(np.array([0, 1, 1, 2]), np.array([1, 1, 1, 1]), 3), CLASSES)
    assert (result["collapsed"], result["collapsed_to"]) == (True, "dog")
    assert result["accuracy"] == result["majority_rate"] == 50.0


def test_a_class_without_images_has_no_accuracy():
    result = figures(confusion_of(np.array([0, 0, 1]), np.array([0, 1, 1]), 3), CLASSES)
    assert result["per_class"]["owl"] == {"correct": 0, "total": 0, "accuracy": None}
    assert result["macro_accuracy"] == 75.0
