"""One run in several processes: the numbers of one process with the same batch, and each image counted once."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import distributed
import numpy as np
import pytest
import record
import run
import torch
from config import ConfigError, resolve
from data import UnlabelledImages, test_transform
from distributed import Part, SharedBatchNorm1d, SharedBatchNorm2d
from exact_runs import exact_run
from test_run import TINY, flags, rows_of, summary_of
from torch import nn
from train import batches, confusion
from variants import ChannelDropout, Maps, random_blocks

TIMES = {"seconds", "train_seconds", "images_per_second"}
CLOSE = 1e-6  # of the largest number beside it; what a part done wrongly changes is above 1e-3
TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# 14 training images, 21 of the target and 7 held out. Batches of 10: of the test sets the last has one image, which
# two processes cannot share.
SWITCHES = {name: value for name, value in TINY.items() if name != "epochs"}
SWITCHES |= {"batch_size": 10, "updates": 2}
RUNS = {
    # passes of 4, 4, 3 and 3 images
    "baseline": {"mode": "baseline", "batch_size": 8, "accumulate": 2, "test_set": "source-train"},
    "random": {"mode": "random", "layers": [1, 4], "at_eval": "on", "batch_size": 5, "updates": 5},
    "da": {"mode": "da", "layers": [4, 13], "updates": 3},
    "da-train": {"mode": "da", "layers": [4], "record_mode": "train", "batch_size": 7},
    "dropout2d": {"mode": "dropout2d", "layers": [4], "drop_rate": 0.5, "batch_size": 7},
    "dann": {"mode": "dann", "pipeline": "device"},
}
RESUMED = "random"


def words(out, name):
    return flags(**SWITCHES | RUNS[name], out=out)


# --- whole runs ---


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Every run by two processes; one that two stopped, for one to go on; one the other way round."""
    folder = tmp_path_factory.mktemp("two")
    assert exact_run(words(folder / "by-one-then-two", RESUMED), stopped=True) == 0
    todo = [[words(folder / name, name), False] for name in RUNS]
    todo.append([words(folder / "by-two-then-one", RESUMED), True])
    todo.append([["--resume", *words(folder / "by-one-then-two", RESUMED)], False])
    (folder / "runs.json").write_text(json.dumps(todo))
    command = [*TORCHRUN, str(TESTS / "exact_runs.py"), str(folder / "runs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")

    def get(name):
        if not (folder / name).exists():
            assert exact_run(words(folder / name, name)) == 0
        return folder / name

    return get


def assert_same_run(folder, expected):
    """Up to the order in which float64 numbers are added: 1e-16, which BatchNorm over few values enlarges."""
    for row, right in zip(rows_of(folder), rows_of(expected), strict=True):
        for key in right.keys() - TIMES:
            exact = key not in ("train_loss", "density")
            assert row[key] == (right[key] if exact else pytest.approx(right[key], rel=CLOSE)), key
    ours, theirs = (record.read_checkpoint(f / "checkpoint.pt") for f in (folder, expected))
    for part in {"model", "head"} & theirs.keys():
        for name, tensor in theirs[part].items():
            bound = CLOSE * tensor.abs().max().item()
            torch.testing.assert_close(ours[part][name], tensor, rtol=0, atol=bound, msg=name)
    assert torch.equal(ours["cpu_rng"], theirs["cpu_rng"])
    assert ours["config"] | {"out": ""} == theirs["config"] | {"out": ""}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_numbers_of_one(name, by_two, by_one):
    assert_same_run(by_two / name, by_one(name))
    assert record.check(by_two / name) == []
    assert summary_of(by_two / name)["versions"]["processes"] == 2
    assert summary_of(by_one(name))["versions"]["processes"] == 1


@pytest.mark.slow
def test_resumed_by_more_processes(by_two, by_one):
    assert_same_run(by_two / "by-one-then-two", by_one(RESUMED))


@pytest.mark.slow
def test_resumed_by_fewer_processes(by_two, by_one):
    folder = by_two / "by-two-then-one"
    assert len(rows_of(folder)) == 1 and not (folder / "summary.json").exists()
    assert exact_run(["--resume", *words(folder, RESUMED)]) == 0
    assert_same_run(folder, by_one(RESUMED))


@pytest.mark.slow
def test_an_uneven_test_set_is_counted_once(by_two):
    """Also where the last batch has fewer images than there are processes: 21 = 10 + 10 + 1."""
    for name, stem, images in (
        ("da", "target", 21),
        ("da", "holdout", 7),
        ("baseline", "invalid_test", 14),
    ):
        confusion = torch.tensor(rows_of(by_two / name)[-1][f"{stem}_confusion"])
        assert confusion.sum(1).tolist() == [images // 7] * 7


# --- the command ---


@pytest.mark.slow
def test_the_command(tmp_path):
    """As users start it, in float32: the first batches come before rounding can tell."""
    switches = TINY | {"mode": "da", "layers": [4], "epochs": 1}
    command = [*TORCHRUN, run.__file__, *flags(**switches, out=tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("warning: toy data") == 2  # at the start and with the summary
    assert done.stdout.count("epoch 1/1  loss") == 1
    names = "config.yaml metrics.jsonl summary.json checkpoint.pt curves.png maps.png"
    assert {path.name for path in (tmp_path / "two").iterdir()} == set(names.split())
    assert record.check(tmp_path / "two") == []
    assert run.main(flags(**switches, out=tmp_path / "one")) == 0
    (one,), (two,) = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    assert two["fired"] == one["fired"] and two["target_total"] == 21


@pytest.mark.slow
def test_bad_input_is_told_once_before_anything_is_written(tmp_path):
    switches = TINY | {"batch_size": 13, "image_size": 64, "holdout": 0.1}  # 14 = 13 + 1
    command = [*TORCHRUN, run.__file__, *flags(**switches, out=tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode != 0
    assert done.stderr.count("error: batch_size: 13 with accumulate 1 leaves 1 of 14") == 1
    assert "for one pass of 2 processes" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "r").exists()


# --- parts, in processes that are threads here ---


class Processes:
    """As many threads that pass for processes: `size`, `rank` and `summed` are theirs."""

    def __init__(self, count, monkeypatch):
        self.count, self.barrier = count, threading.Barrier(count, timeout=60)
        self.own, self.given = threading.local(), [None] * count
        monkeypatch.setattr(distributed, "size", lambda: count)
        monkeypatch.setattr(distributed, "rank", lambda: self.own.rank)
        monkeypatch.setattr(distributed, "summed", self.summed)

    def summed(self, t):
        self.given[self.own.rank] = t
        self.barrier.wait()
        total = sum(self.given)
        self.barrier.wait()
        return total

    def run(self, work):
        """What work() gives in each."""
        results = [None] * self.count

        def start(rank):
            self.own.rank = rank
            try:
                results[rank] = work()
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture
def processes(monkeypatch):
    return lambda count: Processes(count, monkeypatch)


@pytest.mark.parametrize("count", (2, 3, 5))
def test_parts_make_up_the_batch(count, processes):
    processes = processes(count)
    for images in (1, 2, 4, 7, 8, 100):
        for passes in (1, 2, 3):
            lists = processes.run(lambda n=images, k=passes: distributed.parts(n, k))
            of_pass = list(zip(*lists, strict=True))
            assert len(of_pass) == record.parts(images, passes)
            seen = []
            for shares in of_pass:
                first = len(seen)
                counted = [range(images)[part.images] for part in shares if part.counts]
                seen += [i for numbers in counted for i in numbers]
                whole = len(seen) - first
                assert all(part.whole == whole for part in shares)
                assert all(part.images.start == first + part.start for part in shares)
                sizes = [part.count for part in shares]
                assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0
                assert sum(sizes) == (whole if whole >= count else count * whole)
            assert seen == list(range(images))


def test_one_process_has_it_all():
    assert distributed.parts(7) == [Part(slice(0, 7), 0, 7, True)]
    assert (distributed.size(), distributed.rank()) == (1, 0)
    t = torch.ones(3)
    assert distributed.summed(t) is t
    model = nn.Sequential(nn.BatchNorm2d(2))
    distributed.share_statistics(model)
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("affine", (True, False))
@pytest.mark.parametrize("shape", ((7, 5, 4, 3), (7, 5)))
def test_shared_batch_norm_is_that_of_the_whole_batch(shape, affine, dtype, processes):
    """Unequal parts, channels far from 0 and a channel of one value: outputs, gradients and buffers."""
    torch.manual_seed(0)
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 100).to(dtype)
    x[:, 1] = 2.5
    grad = torch.randn(shape, dtype=dtype)
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    plain = kind(5, affine=affine).double()
    for parameter in plain.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    whole = x.double().clone().requires_grad_()
    right = plain(whole)
    right.backward(grad.double())

    def part():
        (mine,) = (part.images for part in distributed.parts(len(x)))
        model = nn.Sequential(kind(5, affine=affine)).to(dtype)
        model[0].load_state_dict(before)
        distributed.share_statistics(model)
        assert type(model[0]) in (SharedBatchNorm1d, SharedBatchNorm2d)
        own = x[mine].clone().requires_grad_()
        y = model(own)
        y.backward(grad[mine])
        gradients = [p.grad for p in model.parameters()]
        assert set(model.state_dict()) == {f"0.{name}" for name in before}
        distributed.share_statistics(model, False)
        assert type(model[0]) is kind
        return y.detach(), own.grad, model[0].state_dict(), gradients

    before = {name: t for name, t in plain.state_dict().items()}
    before |= kind(5, affine=False).state_dict()  # the buffers as they were
    results = processes(2).run(part)
    close = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    )

    def same(actual, expected):
        torch.testing.assert_close(actual.double(), expected.double(), **close)

    same(torch.cat([y for y, *_ in results]), right.detach())
    same(torch.cat([own for _, own, *_ in results]), whole.grad)
    for _, _, state, _ in results:
        assert state["num_batches_tracked"] == 1
        same(state["running_mean"], plain.running_mean)
        same(state["running_var"], plain.running_var)
    gradients = zip(*(gradients for *_, gradients in results), strict=True)
    for parts, parameter in zip(gradients, plain.parameters(), strict=True):
        same(sum(parts), parameter.grad)


def test_shared_batch_norm_in_evaluation_and_alone_is_plain(processes):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 2, 2)

    def part():
        model = nn.Sequential(nn.BatchNorm2d(3))
        distributed.share_statistics(model)
        with distributed.alone(model):
            alone = model(x[distributed.rank() :])
        return alone, model[0].running_mean.clone(), model.eval()(x)

    for rank, (alone, mean, tested) in enumerate(processes(2).run(part)):
        plain = nn.BatchNorm2d(3)
        assert torch.equal(alone, plain(x[rank:]))
        assert torch.equal(mean, plain.running_mean)
        assert torch.equal(tested, plain.eval()(x))


def test_gradients_are_added_whatever_their_strides(processes):
    def part():
        weight = nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
        unused, bias = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4))
        numbers = torch.arange(48.0).view(4, 3, 2, 2) * (distributed.rank() + 1)
        weight.grad = numbers.to(memory_format=torch.channels_last)
        bias.grad = torch.full((4,), 1.0 + distributed.rank())
        distributed.add_gradients([weight, unused, bias])
        return weight.grad, unused.grad, bias.grad

    for weight, unused, bias in processes(2).run(part):
        assert torch.equal(weight, torch.arange(48.0).view(4, 3, 2, 2) * 3)
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert unused is None
        assert torch.equal(bias, torch.full((4,), 3.0))


# --- maps that are not fastshape.attach's ---


@pytest.mark.parametrize("side", (1, 2, None))
def test_blocks_of_a_part(side):
    x = torch.zeros(7, 3, 5, 4)
    torch.manual_seed(1)
    whole = random_blocks(x, 0.5, side).to_bool()
    after = torch.get_rng_state()
    for start in (0, 3):
        torch.manual_seed(1)
        assert torch.equal(random_blocks(x[start:], 0.5, side, start).to_bool(), whole[start:])
        assert torch.equal(torch.get_rng_state(), after)


def test_channels_dropped_of_a_part():
    x = torch.randn(7, 3, 4, 4)
    model = nn.Sequential(nn.Identity())
    dropout = ChannelDropout(model, ["0"], 0.4)
    torch.manual_seed(1)
    whole = nn.functional.dropout2d(x, 0.4)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(model(x), whole)
    dropout.first_sample, dropout.samples = 2, 7
    torch.manual_seed(1)
    assert torch.equal(model(x[2:5]), whole[2:5])
    assert torch.equal(torch.get_rng_state(), after)


def test_variants_are_told_where_their_images_are():
    config = resolve(TINY | {"mode": "random", "layers": [4], "mask_unit": "channel"})[0]
    method = run.build(config).method
    assert isinstance(method.attachment, Maps)
    method.predict(torch.zeros(2, 3, 32, 32), 6)
    assert method.attachment.first_sample == 6


def test_a_test_draws_the_maps_of_its_part_and_counts_what_all_have_once(processes):
    """Batches of 3 and 1: the first is shared, of the second both processes have the image."""
    config = resolve(TINY | {"batch_size": 3})[0]
    images = UnlabelledImages(np.zeros((4, 32, 32, 3), np.uint8), range(4), test_transform(32))

    class Watched:
        device = torch.device("cpu")

        def predict(self, x, start):
            starts.append((len(x), start))
            return torch.eye(7)[:1].expand(len(x), 7)

    starts = []
    work = processes(2)

    def part():
        loader = [
            (x, torch.zeros(len(x), dtype=torch.int64))
            for x in batches(images, np.arange(4), config, 1)
        ]
        parts = [distributed.parts(n)[0] for n in (3, 1)]
        return confusion(Watched(), loader, parts, lambda n: None)

    for counts in work.run(part):
        assert counts[0, 0] == counts.sum() == 4
    assert sorted(starts) == [(1, 0), (1, 0), (1, 0), (2, 1)]


def test_random_maps_of_the_classifier_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    config = resolve(TINY | {"mode": "random", "layers": ["fc"], "p_zero": 0.5})[0]
    with pytest.raises(ConfigError, match="layers: 'fc' gives 7 elements an image; random maps of"):
        run.build(config)


def test_a_gpu_that_all_would_share_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    distributed.take_device("cpu")
    with pytest.raises(ConfigError, match="device: 'cuda:0' with 2 processes, of which each"):
        distributed.take_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="process number 1 on a machine of 1 GPUs"):
        distributed.take_device("cuda")
