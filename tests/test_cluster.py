"""Suites on a Ray cluster of several nodes on this machine, one of which is killed in mid-suite."""

from collections import Counter

import pytest
import record
import suite
import workers
from stand_in import Stand

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")
from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """A head that runs nothing, and a node of two CPUs and what Ray takes for a GPU."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    found.add_node(num_cpus=2, num_gpus=1)
    yield found
    found.shutdown()


def states(stand):
    return {n: r["state"] for n, r in record.read_json(stand.out / "suite.json")["runs"].items()}


def test_a_killed_node_loses_nothing_and_nothing_is_run_twice(cluster, tmp_path, monkeypatch):
    stand = Stand(tmp_path, monkeypatch, runs=12)
    bad = stand.names[0]  # it ends first, and so long before the node does
    stand.tell("sleep", 4)  # so long that none ends while the node dies
    stand.tell("sleep", None, bad)
    stand.tell("fail", 3, bad)
    mortal = cluster.add_node(num_cpus=2)
    at_death = []

    class Dying(workers.Ray):
        """Its node dies when some runs are done and others under way."""

        def finished(self, timeout):
            ended = super().finished(timeout)
            going = stand.started - stand.ended
            if not at_death and len(stand.ended) >= 3 and len(going) == 4:
                at_death.extend(n for n in stand.names if (stand.out / n / "summary.json").exists())
                cluster.remove_node(mortal, allow_graceful=False)
            return ended

    monkeypatch.setattr(suite, "Ray", Dying)
    words = [*stand.words, "--ray-address", cluster.address]
    assert suite.main(words) == 1  # because of the one that fails by itself
    assert states(stand) == {name: "failed" if name == bad else "done" for name in stand.names}
    index = record.read_json(stand.out / "suite.json")
    assert index["runs"][bad]["problem"] == ["one", "the last words"]

    assert stand.started.keys() == set(stand.names) and max(stand.started.values()) == 2
    twice = {name for name, count in stand.started.items() if count == 2}
    assert 1 <= len(twice) <= 2, stand.events()  # what its two CPUs were at, once more
    assert at_death and not twice & set(at_death)
    assert stand.started[bad] == 1  # failing is no reason to be started again

    before = stand.started
    stand.tell("fail", None, bad)
    monkeypatch.setattr(suite, "Ray", workers.Ray)
    assert suite.main(words) == 0
    assert set(states(stand).values()) == {"done"}
    assert stand.started - before == Counter([bad])  # no finished run, and no other


@pytest.mark.parametrize("per_device", [1, 2])
def test_a_gpu_is_shared_by_as_many_runs_as_asked(per_device, cluster, tmp_path, monkeypatch):
    stand = Stand(tmp_path, monkeypatch, runs=6, device="cuda")
    stand.tell("sleep", 0.5)
    words = [*stand.words, "--ray-address", cluster.address, "--per-device", str(per_device)]
    assert suite.main(words) == 0
    assert stand.most_at_once() == stand.most_at_once(gpu="0") == per_device
    assert stand.started == Counter(stand.names)


def test_a_true_run_sends_its_record_back(cluster, tmp_path):
    path, name = tmp_path / "true.yaml", "random-art_painting-cartoon-s0"
    path.write_text("""
title: a true run
defaults: {data: toy, limit: 3, image_size: 32, epochs: 1, batch_size: 8}
sources: [art_painting]
targets: [cartoon]
seeds: [0]
tables: {one: {title: One, arms: {random: {mode: random, layers: 4, p_zero: 0.3}}}}
profiles: {full: {}}
""")
    arguments = [str(path), "--out", str(tmp_path / "out"), "--set", "device=cpu"]
    # begun on this machine once, of which nothing may be left beside the record that comes
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "checkpoint.pt").write_bytes(b"half")
    assert suite.main([*arguments, "--ray-address", cluster.address]) == 0
    folder = tmp_path / "out" / name
    assert record.check(folder) == []
    assert {"curves.png", "maps.png", "log.txt"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ray-address", "127.0.0.1:1"], "ray-address: no cluster at '127.0.0.1:1'"),
        (["--ray-address", "auto", "--jobs", "2"], "--jobs is for one machine"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert suite.main(["study", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_without_ray_the_error_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert suite.main(["study", "--out", str(tmp_path / "out"), "--ray-address", "auto"]) == 2
    assert "--ray-address needs Ray (pip install ray)" in capsys.readouterr().err
