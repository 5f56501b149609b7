"""Suites on a Ray cluster of several nodes on this machine, one of which is killed in mid-suite."""

from collections import Counter

import pytest
from domainshift import files
from domainshift.records.schema import CHECKPOINT, TRAINING
from domainshift.records.validate import check
from domainshift.sweep import cluster, command, sweeping
from small_suites import small
from stand_in_worker import Stand

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")
from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes():
    """A head that runs nothing, and a node of two CPUs and what Ray takes for a GPU."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes.add_node(num_cpus=2, num_gpus=1)
    yield nodes
    nodes.shutdown()


def test_a_killed_node_loses_nothing_and_nothing_is_made_twice(
    nodes, tmp_path, monkeypatch, capsys
):
    stand = Stand(tmp_path, monkeypatch, trainings=12)
    bad = stand.names[0]  # it ends first, and so long before the node does
    stand.tell("sleep", 4)  # so long that none ends while the node dies
    stand.tell("sleep", None, bad)
    stand.tell("fail", 1, bad)
    mortal = nodes.add_node(num_cpus=2)
    at_death = []

    class Dying(cluster.Cluster):
        """Its node dies when some trainings are done and others under way."""

        def finished(self, timeout):
            ended = super().finished(timeout)
            going = stand.started - stand.ended
            if not at_death and len(stand.ended) >= 3 and len(going) == 4:
                at_death.extend(stand.done)
                nodes.remove_node(mortal, allow_graceful=False)
            return ended

    monkeypatch.setattr(sweeping, "Cluster", Dying)
    words = ["--ray-address", nodes.address]
    assert stand.main(*words) == 1  # because of the one that fails by itself
    assert stand.done == {*stand.names} - {bad}
    assert stand.failure(bad) == ["one", "the last words"]
    assert "(1/2)  100 s" in capsys.readouterr().out  # a training's own time, not Ray's

    assert stand.started.keys() == set(stand.names) and max(stand.started.values()) == 2
    twice = {name for name, count in stand.started.items() if count == 2}
    assert 1 <= len(twice) <= 2, stand.events()  # what its two CPUs were at, once more
    assert at_death and not twice & set(at_death)
    assert stand.started[bad] == 1  # failing is no reason to be started again

    before = stand.started
    stand.tell("fail", None, bad)
    monkeypatch.setattr(sweeping, "Cluster", cluster.Cluster)
    assert stand.main(*words) == 0
    assert stand.done == set(stand.names)
    assert stand.started - before == Counter([bad])  # nothing that is finished, and no other


@pytest.mark.parametrize("per_device", [1, 2])
def test_a_gpu_is_shared_by_as_many_trainings_as_asked(per_device, nodes, tmp_path, monkeypatch):
    stand = Stand(tmp_path, monkeypatch, trainings=6, device="cuda")
    stand.tell("sleep", 0.5)
    assert stand.main("--ray-address", nodes.address, "--per-device", str(per_device)) == 0
    assert stand.most_at_once() == stand.most_at_once(gpu="0") == per_device
    assert stand.started == Counter(stand.names)


def test_a_true_training_sends_its_records_back(nodes, tmp_path):
    arms = {"random": {"mode": "random", "layers": 4, "p_zero": 0.3}}
    tiny = {"data": "toy", "weights": "none", "model": "resnet18-slim", "limit": 3}
    tiny |= {"image_size": 32, "epochs": 1, "batch_size": 8}
    tables = {"one": {"title": "One", "arms": arms}}
    path = small(tmp_path, defaults=tiny, targets=["cartoon", "photo"], tables=tables)
    out, name = tmp_path / "out", "random-art_painting-s0"
    # begun on this machine once, of which nothing may be left beside the records that come
    (out / name).mkdir(parents=True)
    (out / name / CHECKPOINT).write_bytes(b"half")
    arguments = [path, "--out", str(out), "--set", "device=cpu", "--ray-address", nodes.address]
    assert command.main(arguments) == 0
    assert check(out / name) == []
    files_there = {p.relative_to(out / name).as_posix() for p in (out / name).rglob("*")}
    assert {"curves.png", "maps.png", "log.txt", TRAINING, "summary.json"} <= files_there
    assert {"evaluations/cartoon-bn-source.npz", "evaluations/photo-bn-source.json"} <= files_there
    assert CHECKPOINT not in files_there
    rates = files.read_json(tmp_path / "rates.json")
    assert [rate["device"] for rate in rates] == ["a cpu node of a Ray cluster"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ray-address", "127.0.0.1:1"], "ray-address: no cluster at '127.0.0.1:1'"),
        (["--ray-address", "auto", "--jobs", "2"], "--jobs is for one machine"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert command.main(["study", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_without_ray_the_error_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    words = ["study", "--out", str(tmp_path / "out"), "--ray-address", "auto"]
    assert command.main(words) == 2
    assert "--ray-address needs Ray (pip install ray)" in capsys.readouterr().err
