"""Worker processes of this machine: which there are, and what a kill leaves."""

import os
import signal
import subprocess
import sys
import time

import pytest
from domainshift.lease import take
from domainshift.sweep import local, worker
from domainshift.sweep.local import Local, Task, slots
from domainshift.sweep.state import LOG


def task_of(stand, number, wait=True):
    """A task for a pool, of one of the stand's trainings."""
    job = stand.plan.jobs[number]
    folder = stand.out / job.name
    folder.mkdir(parents=True, exist_ok=True)
    tests = [test.model_dump() for test in job.tests]
    return Task(job.name, job.values, tests, folder, take(folder))


def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for(pool):
    ended = []
    until(lambda: ended.extend(pool.finished(0.1)) or ended)
    (only,) = ended
    return only


@pytest.fixture
def pool():
    pool = Local("cpu", [{"OMP_NUM_THREADS": "1"}])
    yield pool
    pool.stop()


# --- slots ------------------------------------------------------------------------------------


def test_slots_divide_cores_and_take_gpus_in_turn(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    places = slots("cpu", jobs=3, per_device=1, gpus=0, cores=8)
    assert places == [{"OMP_NUM_THREADS": "2"}] * 3
    assert slots("cpu", jobs=None, per_device=1, gpus=0, cores=8) == [{"OMP_NUM_THREADS": "8"}]
    places = slots("cuda", jobs=None, per_device=2, gpus=2, cores=2)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["0", "1", "0", "1"]
    assert {place["OMP_NUM_THREADS"] for place in places} == {"1"}
    assert len(slots("cuda", jobs=3, per_device=2, gpus=2, cores=2)) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    places = slots("cuda", jobs=None, per_device=1, gpus=2, cores=2)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["5", "7"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert slots("cpu", jobs=2, per_device=1, gpus=0, cores=8) == [{"OMP_NUM_THREADS": "3"}] * 2


def test_workers_are_bound_to_their_gpu(stand, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    stand.tell("sleep", 0.1)
    pool = Local("cuda", slots("cuda", jobs=None, per_device=2, gpus=2, cores=2))
    waiting, ended = list(range(12)), []
    while len(ended) < 12:
        while waiting and pool.room():
            pool.start(task_of(stand, waiting.pop()))
        ended += pool.finished(1)
    pool.stop()
    assert stand.most_at_once() == 4 == len(stand.processes)
    assert stand.most_at_once(gpu="0") == stand.most_at_once(gpu="1") == 2
    assert {threads for *_, threads, _ in stand.events()} == {"7"}


# --- how a task ends --------------------------------------------------------------------------


def test_the_time_of_a_task_is_the_workers(stand, pool):
    pool.start(task_of(stand, 0))
    ended = wait_for(pool)
    assert (ended.failure, ended.seconds) == (None, 100.0)


def test_a_failed_task_has_the_last_lines_of_its_log(stand, pool):
    stand.tell("fail", 2, stand.names[0])
    for number in (0, 1):
        task = task_of(stand, number)
        (task.folder / LOG).write_text("earlier\n")
        pool.start(task)
        failure = wait_for(pool).failure
        assert failure == ((2, ["one", "the last words"]) if number == 0 else None)
    assert len(stand.processes) == 1


def test_an_unforeseen_error_ends_the_worker_and_no_other_task(stand, pool):
    stand.tell("fail", 1, stand.names[0])
    stand.tell("ends", "", stand.names[0])
    for number in range(3):
        pool.start(task_of(stand, number))
        assert (wait_for(pool).failure is None) == (number > 0)
    assert len(stand.processes) == 2


def test_a_killed_worker_is_named_and_replaced(stand, pool):
    stand.tell("sleep", 30, stand.names[0])
    pool.start(task_of(stand, 0))
    until(lambda: stand.started)
    os.kill(pool.workers[0].process.pid, signal.SIGKILL)
    failure = wait_for(pool).failure
    assert (failure.status, failure.lines[-1]) == (-signal.SIGKILL, "killed by SIGKILL")
    pool.start(task_of(stand, 1))
    assert wait_for(pool).failure is None
    assert len(stand.processes) == 2


def test_a_worker_that_is_killed_while_it_waits_costs_nothing(stand, pool):
    pool.start(task_of(stand, 0))
    wait_for(pool)
    os.kill(pool.workers[0].process.pid, signal.SIGKILL)
    pool.workers[0].process.wait()
    pool.start(task_of(stand, 1))
    assert wait_for(pool).failure is None


def test_a_worker_that_cannot_start_fails_its_task(stand, pool, monkeypatch):
    monkeypatch.setattr(local, "COMMAND", (sys.executable, "-c", "raise SystemExit('no torch')"))
    pool.start(task_of(stand, 0))
    assert wait_for(pool).failure == (1, ["no torch"])


def test_stop_ends_what_is_going_on(stand, pool):
    stand.tell("sleep", 30)
    pool.start(task_of(stand, 0))
    until(lambda: stand.started)
    process = pool.workers[0].process
    pool.stop()
    assert process.returncode == -signal.SIGKILL and not stand.ended


def test_a_worker_whose_suite_is_gone_does_not_begin():
    done = subprocess.run(
        local.COMMAND, env=os.environ | {worker.PARENT: "1"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "the process that started this worker is gone\n")
