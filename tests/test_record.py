"""What a run leaves behind: whole files or none, and figures that are exact counts."""

import errno
import json
import os
import re
import shutil

import pytest
import record
import run
import torch
import yaml
from config import resolve
from study import read_run
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
        "fired": {"conv1": 5}, "density": {"conv1": 0.5}, "updates": 5, "passes": 5,
        "bn_untouched": None, **more,
    }  # fmt: skip


def summary_of(rows, **config):
    switches = {"source": "photo", "target": "sketch", "mode": "random", "layers": [1], "seed": 0}
    switches |= {"data": "toy", "weights": "none", "warnings": ["first"]}
    return record.summarize(
        switches | config,
        rows,
        layers=["conv1"],
        classes=("cat", "dog"),
        weights={"source": "none", "sha256": None},
        versions={"torch": "2"},
    )


def test_the_last_epoch_is_published_not_the_best():
    summary = summary_of([row(1, 9), row(2, 4)])
    assert (summary["target_correct"], summary["target_total"]) == (14, 20)
    assert summary["target_accuracy"] == 70.0
    assert summary["source_accuracy"] is None
    assert (summary["seconds"], summary["images_per_second"]) == (6.0, 20.0)
    assert summary["fired"] == {"conv1": 10}
    assert summary["warnings"] == ["first"]


def test_the_choice_of_an_epoch_stands_beside_the_last_one():
    held_out = [[[2, 2], [0, 4]], [[3, 1], [0, 4]], [[3, 1], [0, 4]], [[1, 3], [0, 4]]]
    target = [9, 4, 8, 5]
    rows = [
        row(epoch, correct, holdout_confusion=held)
        for epoch, (correct, held) in enumerate(zip(target, held_out, strict=True), 1)
    ]
    summary = summary_of(rows)
    assert summary["target_correct"] == 15  # the last epoch's
    assert summary["source_accuracy"] == 62.5
    # epochs 2 and 3 know 7 of 8 held-out images: the earlier one
    assert summary["selected_epoch"] == 2
    assert (summary["selected_target_correct"], summary["selected_target_total"]) == (14, 20)
    assert summary["selected_target_accuracy"] == 70.0
    assert (summary["oracle_epoch"], summary["oracle_target_correct"]) == (1, 19)
    alone = summary_of([row(1, 4), row(2, 4)])
    assert [alone[f"selected_{k}"] for k in ("epoch", "target_accuracy")] == [None, None]
    assert alone["oracle_epoch"] == 1


def test_counts_are_sums_and_an_untouched_batchnorm_is_so_in_every_epoch():
    summary = summary_of([row(1, 4, updates=3, passes=6), row(2, 4, updates=2, passes=4)])
    assert (summary["updates"], summary["passes"], summary["bn_untouched"]) == (5, 10, None)
    for second in (True, False):
        rows = [row(1, 4, bn_untouched=True), row(2, 4, bn_untouched=second)]
        assert summary_of(rows)["bn_untouched"] is second


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


# --- check ---

TINY = ["--data", "toy", "--limit", "3", "--image-size", "32", "--epochs", "2", "--batch-size", "8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, without its pictures."""
    folder = tmp_path_factory.mktemp("check") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.pictures, "curves", lambda *_: None)
        patch.setattr(run.pictures, "maps", lambda *_: None)
        arguments = ["--mode", "da", "--layers", "4", "--accumulate", "3", "--device", "cpu"]
        assert run.main([*TINY, *arguments, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_record_as_it_was_written_has_no_problem(folder):
    assert record.check(folder) == []
    (folder / "checkpoint.pt").unlink()  # records are kept without it
    moved = folder.rename(folder.parent / "elsewhere")
    assert record.check(moved) == []


def digits(text):
    """Where a digit stands that is no part of a word or hash."""
    return [m.start() for m in re.finditer(r"(?<![\w.])\d", text)]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_one_other_digit_is_found(folder, name):
    path = folder / name
    whole = path.read_text()
    places = digits(whole)
    assert len(places) > 5
    for at in places[:: max(1, len(places) // 40)]:
        other = "2" if whole[at] == "1" else "1"
        path.write_text(whole[:at] + other + whole[at + 1 :])
        problems = record.check(folder)
        assert problems, whole[max(0, at - 40) : at + 20]
        assert all(problem.startswith((str(folder), "cannot read")) for problem in problems)
    path.write_text(whole)
    assert record.check(folder) == []


def test_a_seal_of_its_own_does_not_help_a_wrong_summary(folder):
    config, rows, summary = record.read(folder)
    summary["target_correct"] += 1
    record.write_json(folder / "summary.json", record.sealed(summary, config, rows))
    (problem,) = record.check(folder)
    right = summary["target_correct"] - 1
    assert f"target_correct is {right + 1}; config.yaml and metrics.jsonl give {right}" in problem


def rewritten(folder, change):
    """The record with `change` made to its rows, everything that follows from them made anew."""
    config, rows, summary = record.read(folder)
    change(rows)
    facts = {"layers": "layer_names", "weights": "weights", "versions": "versions"}
    facts = {name: summary[key] for name, key in facts.items()}
    summary = record.summarize(config, rows, classes=list(summary["per_class"]), **facts)
    record.write_json_lines(folder / "metrics.jsonl", rows)
    record.write_json(folder / "summary.json", record.sealed(summary, config, rows))
    return record.check(folder)


def setter(name, value, epoch=1):
    return lambda rows: rows[epoch - 1].update({name: value})


WRONG = [
    (setter("target_correct", 22), r"epoch 1: target_correct is 22, not \d+"),
    (setter("target_total", 20), r"epoch 1: target_total is 20, not 21"),
    (setter("holdout_accuracy", 1.5, 2), r"epoch 2: holdout_accuracy is 1.5, not"),
    (setter("fired", {"layer1.1.conv1": 5}), r"epoch 1: layer layer1.1.conv1 fired 5 times in 6 p"),
    (setter("fired", {"layer1.1.conv1": 13}), r"fired 13 times in 6 passes"),
    (lambda rows: [row.update(fired={}) for row in rows], r"epoch 1: fired \[\], not \['layer1"),
    (setter("updates", 3), r"epoch 1: updates is 3, not 2"),
    (setter("passes", 2), r"epoch 1: passes is 2, not 6"),
    (setter("bn_untouched", False, 2), r"epoch 2: bn_untouched is False, not True"),
    (setter("source_train_total", 13), r"epoch 1: source_train_total is 13, not 14"),
    (setter("epoch", 3, 2), r"epoch 2: epoch is 3, not 2"),
    (lambda rows: rows.pop(), r"metrics.jsonl has 1 epochs; 4 updates take 2"),
    (
        lambda rows: rows[0]["target_confusion"][0].__setitem__(0, 40),
        r"epoch 1: tested on \[4\d, 3, 3, 3, 3, 3, 3\] images of the classes; sketch has \[3, 3",
    ),
]


@pytest.mark.parametrize(("change", "problem"), WRONG)
def test_rows_that_no_such_run_gives(folder, change, problem):
    problems = rewritten(folder, change)
    assert any(re.search(problem, line) for line in problems), problems
    assert not any("seal" in line for line in problems)


def test_a_half_written_record(folder):
    for name in ("metrics.jsonl", "summary.json"):
        path = folder / name
        whole = path.read_text()
        path.write_text(whole[:-20])
        (problem,) = record.check(folder)
        assert re.search(f"cannot read .*{name}.*half-written", problem)
        path.write_text(whole)
    (folder / "summary.json").unlink()
    (problem,) = record.check(folder)
    assert "is unfinished: 2 epochs, and no summary.json" in problem
    (folder / "config.yaml").unlink()
    (problem,) = record.check(folder)
    assert "cannot read" in problem and "config.yaml" in problem


@pytest.mark.parametrize("version", [None, 0, record.RECORD_VERSION + 1])
def test_a_record_of_another_version(folder, version):
    summary = json.loads((folder / "summary.json").read_text())
    summary["record_version"] = version
    (folder / "summary.json").write_text(json.dumps(summary))
    (problem,) = record.check(folder)
    assert f"a record of version {version}; this code reads {record.RECORD_VERSION}" in problem


def test_a_record_of_other_switches(folder):
    path = folder / "config.yaml"
    switches = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({k: v for k, v in switches.items() if k != "top_k"} | {"k": 1}))
    problems = record.check(folder)
    assert any("config.yaml: k, top_k: unknown switch, or one that" in p for p in problems)


@pytest.mark.parametrize(
    ("text", "name"), [("[]", "summary.json"), ("[]", "metrics.jsonl"), ("3\n", "metrics.jsonl")]
)
def test_nonsense_is_a_problem_and_no_crash(folder, text, name):
    (folder / name).write_text(text)
    assert record.check(folder)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("metrics.jsonl", r'"train_loss": [\d.]+', '"train_loss": NaN'),
        ("summary.json", r'"seconds": [\d.]+', '"seconds": Infinity'),
        ("config.yaml", r"lr: [\d.]+", "lr: .nan"),
        ("config.yaml", r"seed: 0", "seed: 2020-01-01"),
        ("metrics.jsonl", r'"fired": \{.*?\}', '"fired": ["layer1.1.conv1"]'),
    ],
)
def test_what_json_cannot_hold_is_a_problem_and_no_crash(folder, name, old, new):
    path = folder / name
    text, count = re.subn(old, new, path.read_text())
    path.write_text(text)
    assert count and any("cannot be computed again: " in line for line in record.check(folder))
    assert read_run(folder).kind == "edited"


def test_a_fired_that_is_no_mapping_in_a_sealed_record(folder):
    config, rows, summary = record.read(folder)
    for part in (*rows, summary):
        part["fired"] = []
    summary["fired"] = {}
    record.write_json_lines(folder / "metrics.jsonl", rows)
    record.write_json(folder / "summary.json", record.sealed(summary, config, rows))
    assert any("AttributeError" in line for line in record.check(folder))


def test_held_out_images_that_change_between_epochs(folder):
    """Each epoch's figures follow from its own counts, and the first one's fit the switches."""

    def one_more(rows):
        rows[1]["holdout_confusion"][0][0] += 1
        correct, total = rows[1]["holdout_correct"] + 1, rows[1]["holdout_total"] + 1
        rows[1] |= {"holdout_total": total, "holdout_correct": correct}
        rows[1]["holdout_accuracy"] = record.percent(correct, total)

    (problem,) = rewritten(folder, one_more)
    assert re.search(r"epoch 2: holdout_total is 8, not 7", problem)
    assert read_run(folder).kind == "broken rule"


def test_how_many_images_a_domain_has():
    pacs = resolve({"data": "some/folder", "device": "cpu"})[0]
    assert sum(record.images_per_class(pacs, "sketch")) == 3929
    few = resolve({"data": "some/folder", "limit": 100, "device": "cpu"})[0]
    assert record.images_per_class(few, "sketch") == [100, 100, 100, 100, 100, 80, 100]
    assert record.images_per_class(resolve({"data": "toy"})[0], "photo") == [40] * 7


def test_passes_of_an_update():
    # 14 images in 3 parts: 5, 5 and 4; 6 in 4 parts: 2, 2 and 2
    assert [record.parts(14, 3), record.parts(6, 4), record.parts(1, 8)] == [3, 3, 1]


def test_a_finished_run_that_was_edited_says_so(folder, capsys):
    path = folder / "summary.json"
    path.write_text(path.read_text().replace('"epochs": 2', '"epochs": 3', 1))
    assert run.main(["--resume", "--out", str(folder)]) == 0
    assert "edited after the run: the seal does not fit" in capsys.readouterr().out


def test_the_record_says_what_ran(folder):
    summary = json.loads((folder / "summary.json").read_text())
    switches = yaml.safe_load((folder / "config.yaml").read_text())
    switches.pop("warnings")
    assert summary["config_hash"] == resolve(switches)[0].hash()
    assert summary["versions"]["device"] == "cpu"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|None", str(summary["versions"]["commit"]))
    assert list(summary["density"]) == ["layer1.1.conv1"]
    assert 0 < summary["density"]["layer1.1.conv1"] < 1
