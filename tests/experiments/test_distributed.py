"""One run on several processes: the numbers of one process, and every image counted once."""

import os
import subprocess
import sys
from pathlib import Path

import exact_updates
import pytest
import torch
from domainshift import distributed
from domainshift.config import Config
from domainshift.distributed import Part
from domainshift.errors import ConfigError
from domainshift.methods import Method
from torch import nn

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


# --- updates ---


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """What each of two processes has after its updates."""
    folder = tmp_path_factory.mktemp("two")
    command = [*TORCHRUN, exact_updates.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Warning" not in done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("arm", exact_updates.ARMS)
def test_two_processes_give_the_numbers_of_one(arm, by_two):
    """Uneven parts of batches, accumulated: weights, losses, counts, the random stream, logits."""
    expected = exact_updates.results(arm)
    start = exact_updates.net().state_dict()
    assert not torch.equal(expected["model.7.weight"], start["7.weight"])  # it was trained
    for result in (process[arm] for process in by_two):
        assert result.keys() == expected.keys()
        for name, right in expected.items():
            bound = {"rtol": 1e-6, "atol": 1e-6} if name == "logits" else {"rtol": 0, "atol": 1e-10}
            torch.testing.assert_close(result[name], right, **bound, msg=f"{arm}: {name}")


def test_a_parameter_without_gradient_stays_as_it_was():
    expected = exact_updates.results("random-zero")
    assert torch.equal(expected["model.0.weight"], exact_updates.net().state_dict()["0.weight"])


def test_processes_without_a_common_batchnorm_keep_common_statistics(by_two):
    first, second = (process["with BatchNorm"]["statistics"] for process in by_two)
    assert torch.equal(first, second)
    assert not torch.equal(first, exact_updates.trained("baseline", nn.BatchNorm2d)[0].statistics())


def test_an_update_of_two_passes_averages_its_gradients_once(by_two):
    assert [process["functions"]["averages"] for process in by_two] == [1, 1]


def test_sums_and_means_over_processes(by_two):
    for process in by_two:
        assert process["functions"]["average"].tolist() == [1.5, 1.5]
        assert process["functions"]["size"] == 2


# --- parts ---


def processes(monkeypatch, count):
    """Become each of `count` processes in turn."""
    monkeypatch.setattr(distributed, "size", lambda: count)
    for rank in range(count):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        yield rank


@pytest.mark.parametrize("count", (2, 3, 5))
def test_parts_make_up_the_batch(count, monkeypatch):
    for images in (1, 2, 4, 7, 8, 100):
        for passes in (1, 2, 3):
            lists = [distributed.parts(images, passes) for _ in processes(monkeypatch, count)]
            of_pass = list(zip(*lists, strict=True))
            assert len(of_pass) == -(-images // -(-images // passes))
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


def test_one_process_has_everything():
    assert distributed.parts(7) == [Part(slice(0, 7), 0, 7, True)]
    assert (distributed.size(), distributed.rank(), distributed.first_here()) == (1, 0, True)
    t = torch.ones(3)
    assert distributed.summed(t) is t
    model = nn.Sequential(nn.BatchNorm2d(2))
    assert distributed.share_batch_norm(model, CUDA) == {}
    assert type(model[0]) is nn.BatchNorm2d
    loss = exact_updates.trained("baseline")[0].training_pass
    with distributed.unaveraged(loss):
        assert not isinstance(loss, nn.Module)
    assert distributed.caveats("cpu") == []


def test_a_group_that_another_launcher_made_counts(tmp_path, monkeypatch):
    """Its processes are those of the run, whatever started them."""
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    code = """
import sys
import torch
from domainshift import distributed
file, rank = sys.argv[1:]
torch.distributed.init_process_group("gloo", f"file://{file}", world_size=2, rank=int(rank))
print(distributed.size(), distributed.rank())
distributed.leave()
"""
    path = {"PYTHONPATH": str(EXPERIMENTS)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "group"), str(rank)],
            env=os.environ | path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [process.communicate(timeout=120)[0].split() for process in processes] == [
        ["2", "0"],
        ["2", "1"],
    ]


def test_a_variable_of_torchrun_alone_is_one_process(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not distributed.launched() and distributed.size() == 1


# --- BatchNorm ---


def test_on_gpus_batchnorm_is_torchs_synchronized_one(monkeypatch):
    """The same tensors in other modules; `restore` brings back the modules."""
    monkeypatch.setattr(distributed, "size", lambda: 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4, momentum=0.3)))
    model.add_module("head", nn.BatchNorm1d(5))
    before = list(model.modules())
    tensors = model.state_dict(keep_vars=True)
    assert distributed.share_batch_norm(model, CPU) == {}
    assert list(model.modules()) == before
    replaced = distributed.share_batch_norm(model, CUDA)
    assert sorted(replaced) == ["1.0", "head"]
    assert type(model[1][0]) is type(model.head) is nn.SyncBatchNorm
    assert model[1][0].momentum == 0.3
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is tensors[name], name
    model.eval()
    distributed.restore(model, replaced)
    assert list(model.modules()) == before
    assert not any(module.training for module in model.modules())


def test_processes_on_cpus_are_warned_of(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    (warning,) = distributed.caveats("cpu")
    assert warning.startswith(
        "2 processes on CPUs: each normalizes with the BatchNorm statistics of"
    )
    assert distributed.caveats("cuda") == []
    assert Method.check(Config(device="cpu"), None) == [warning]  # and so the record has it


@pytest.mark.parametrize("rank", (0, 1))
def test_recalibration_measures_parts_where_batchnorm_is_shared(rank, monkeypatch):
    method, *_ = exact_updates.trained("random", nn.BatchNorm2d)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    starts, passed = [], []
    monkeypatch.setattr(method, "place", lambda start, whole: starts.append((start, whole)))
    method.model.register_forward_pre_hook(lambda module, x: passed.append(len(x[0])))
    batches = [exact_updates.images(7, 0), exact_updates.images(4, 1)]
    method.recalibrate(batches)
    monkeypatch.setattr(distributed, "shares_batch_norm", lambda device: True)
    method.recalibrate(batches)
    assert starts == [(0, 7), (0, 4), *([(0, 7), (0, 4)] if rank == 0 else [(3, 7), (2, 4)])]
    assert passed == [7, 4, *([3, 2] if rank == 0 else [4, 2])]


# --- processes ---


def test_a_gpu_that_all_would_share_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    distributed.take_device("cpu")
    with pytest.raises(ConfigError, match="device: 'cuda:0' with 2 processes, each of which needs"):
        distributed.take_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="process number 1 on a machine of 1 GPUs"):
        distributed.take_device("cuda")


@pytest.mark.parametrize(("rank", "raised"), [(0, SystemExit), (1, ValueError), (2, SystemExit)])
def test_the_first_process_that_fails_reports_it(rank, raised, monkeypatch):
    """Processes 1 and 2 of 3 fail: 1 raises its error, the others wait to be ended."""
    monkeypatch.setattr(distributed, "size", lambda: 3)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "summed", lambda failed: torch.tensor([0, 1, 1]))
    waits = []
    monkeypatch.setattr(distributed.time, "sleep", waits.append)
    with pytest.raises(raised):
        with distributed.together():
            if rank > 0:
                raise ValueError("bad input")
    assert bool(waits) == (raised is SystemExit)


def test_an_error_in_one_process_passes_through():
    with pytest.raises(ZeroDivisionError), distributed.together():
        raise ZeroDivisionError


def test_the_loss_of_a_process_is_reported(monkeypatch):
    def gone(t):
        raise RuntimeError("Connection closed by peer. Long explanation.")

    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", gone)
    with pytest.raises(distributed.Lost, match=r"lost one of 2 processes.*\(Connection closed by"):
        distributed.summed(torch.ones(1))
