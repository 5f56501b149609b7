"""What a run leaves behind: whole files or none, and figures that are exact counts."""

import errno
import json
import os

import pytest
import record
import torch
from torchmetrics.functional.classification import multiclass_accuracy


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    record.write_json(path, {"k": 1})
    record.write_json(path, {"k": 2})
    assert json.loads(path.read_text()) == {"k": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


class FullDisk:
    """A file that takes the first half of what is written to it, then has no room."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    record.write_checkpoint(path, {"epoch": 1, "model": {"w": torch.ones(3)}})
    monkeypatch.setattr(
        record, "open", lambda *args, **kw: FullDisk(open(*args, **kw)), raising=False
    )
    with pytest.raises(record.RecordError, match="checkpoint.pt: No space left.*old one is unto"):
        record.write_checkpoint(path, {"epoch": 2, "model": {"w": torch.zeros(3)}})
    state = record.read_checkpoint(path)
    assert state["epoch"] == 1
    assert torch.equal(state["model"]["w"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(record.RecordError, match="cannot write .*nowhere.*nothing was written"):
        record.write_json(tmp_path / "nowhere" / "a.json", {})


def test_a_broken_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    record.write_checkpoint(path, {"w": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(record.RecordError, match="cannot read checkpoint .*checkpoint.pt"):
        record.read_checkpoint(path)


def test_a_checkpoint_runs_no_code(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": os.system}, path)
    with pytest.raises(record.RecordError, match="cannot read checkpoint"):
        record.read_checkpoint(path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "{", "just words"])
def test_a_file_without_switches_is_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(record.RecordError, match="config.yaml"):
        record.read_yaml(path)


def test_not_a_number_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write_json_lines(tmp_path / "metrics.jsonl", [{"loss": float("nan")}])
    assert not list(tmp_path.iterdir())


# --- figures ---

CLASSES = ("cat", "dog", "owl")


def counts_of(labels, predicted, n=3):
    counts = torch.zeros(n, n, dtype=torch.int64)
    for true, answer in zip(labels, predicted, strict=True):
        counts[true, answer] += 1
    return counts


def test_figures_by_hand():
    # 4 cats (3 right), 2 dogs (none right), 4 owls (all right)
    counts = torch.tensor([[3, 1, 0], [1, 0, 1], [0, 0, 4]])
    result = record.figures(counts, CLASSES)
    assert (result["correct"], result["total"], result["accuracy"]) == (7, 10, 70.0)
    assert result["per_class"]["cat"] == {"correct": 3, "total": 4, "accuracy": 75.0}
    assert result["macro_accuracy"] == pytest.approx((75 + 0 + 100) / 3)
    assert result["majority_rate"] == 40.0
    assert not result["collapsed"]


def test_figures_agree_with_torchmetrics():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 7, (501,), generator=generator)
    predicted = torch.randint(0, 7, (501,), generator=generator)
    result = record.figures(counts_of(labels, predicted, 7), tuple("abcdefg"))
    for average, key in (("micro", "accuracy"), ("macro", "macro_accuracy")):
        expected = multiclass_accuracy(predicted, labels, num_classes=7, average=average)
        assert result[key] == pytest.approx(100 * expected.item(), abs=1e-4)


def test_collapse_is_flagged():
    result = record.figures(counts_of([0, 1, 1, 2], [1, 1, 1, 1]), CLASSES)
    assert (result["collapsed"], result["collapsed_to"]) == (True, "dog")
    assert result["accuracy"] == result["majority_rate"] == 50.0


def test_a_class_without_images_has_no_accuracy():
    result = record.figures(counts_of([0, 0, 1], [0, 1, 1]), CLASSES)
    assert result["per_class"]["owl"] == {"correct": 0, "total": 0, "accuracy": None}
    assert result["macro_accuracy"] == 75.0


def row(epoch, correct, **more):
    counts = [[correct, 10 - correct], [0, 10]]
    return {"epoch": epoch, "target_confusion": counts, "train_loss": 1.0, "seconds": 3.0} | {
        "source_train_accuracy": 50.0, "source_train_total": 40, "train_seconds": 2.0,
        "fired": {"conv1": 5}, **more,
    }  # fmt: skip


def summary_of(rows, **config):
    switches = {"source": "photo", "target": "sketch", "mode": "random", "layers": [1], "seed": 0}
    switches["device"] = "cpu"
    return record.summarize(
        switches | {"epochs": len(rows)} | config,
        rows,
        layers=["conv1"],
        classes=("cat", "dog"),
        weights={"source": "none", "sha256": None},
        warnings=["first"],
    )


def test_the_last_epoch_is_published_not_the_best():
    summary = summary_of([row(1, 9), row(2, 4)])
    assert (summary["target_correct"], summary["target_total"]) == (14, 20)
    assert summary["target_accuracy"] == 70.0
    assert summary["source_accuracy"] is None
    assert (summary["seconds"], summary["images_per_second"]) == (6.0, 20.0)
    assert summary["fired"] == {"conv1": 10}
    assert summary["warnings"] == ["first"]


def test_an_invalid_figure_never_takes_the_targets_place():
    summary = summary_of([row(1, 4, invalid_test_confusion=[[10, 0], [0, 5]])])
    assert (summary["target_correct"], summary["target_total"]) == (14, 20)
    assert (summary["invalid_test_correct"], summary["invalid_test_total"]) == (15, 15)
    lines = record.summary_lines(summary, "folder")
    assert any(line.startswith("INVALID FIGURE   100.00 %  (15 of 15") for line in lines)


def test_a_collapse_is_among_the_warnings():
    summary = summary_of([row(1, 0)])
    assert summary["collapsed"]
    assert "collapsed: every target image is called dog" in summary["warnings"]
    assert any("YES" in line for line in record.summary_lines(summary, "folder"))
