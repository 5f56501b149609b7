"""Leases of folders: one owner at a time, whatever ends it."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
from domainshift import lease
from domainshift.lease import Busy, Lost, Owner, holder, on_behalf, owner_of, path_of, take
from full_disk import FullDisk

GONE = 2**22 + 1  # above the highest number that Linux gives a process

ELSEWHERE = Owner("far", "far boot pid", 17, "1", time.time() - 3 * 3600, "token")


def leave(folder, owner, number=1, seconds=0.0):
    """The lease of an owner, last touched some seconds ago."""
    path = path_of(folder, number)
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - seconds,) * 2)


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_owner_at_a_time_whom_the_refusal_names(tmp_path):
    with take(tmp_path):
        with pytest.raises(Busy) as caught:
            take(tmp_path)
        who = f"process {os.getpid()} on {socket.gethostname()}, for 0 s"
        assert str(caught.value) == f"{str(tmp_path)!r} is in use by {who}"
        assert holder(tmp_path).process == os.getpid()
    assert files_in(tmp_path) == [] and holder(tmp_path) is None
    take(tmp_path).release()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_process_that_is_gone_has_no_lease(tmp_path, reaped):
    """Also one whose parent has not asked yet how it ended."""
    code = (
        f"import sys, time; sys.path.insert(0, {os.path.dirname(os.path.dirname(lease.__file__))!r})\n"
        "from pathlib import Path; from domainshift.lease import take\n"
        f"take(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Busy, match=f"process {process.pid} on"):
        take(tmp_path)
    process.kill()
    if reaped:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with take(tmp_path) as own:
        assert own.number == 2 and own.before.process == process.pid
    assert files_in(tmp_path) == []
    process.wait()
    process.stdout.close()


def test_a_process_with_the_number_of_one_that_is_gone_is_another(tmp_path):
    with take(tmp_path) as first:
        owner = owner_of(first.path)
    leave(tmp_path, replace(owner, birth="1"))
    take(tmp_path).release()


@pytest.mark.parametrize("number", [1, 3])
def test_on_another_machine_signs_of_life_decide(tmp_path, number):
    for lower in range(1, number):
        leave(tmp_path, ELSEWHERE, lower, 2 * lease.EXPIRY)
    leave(tmp_path, ELSEWHERE, number, lease.EXPIRY - 60)
    with pytest.raises(Busy, match="in use by process 17 on far, for 3 h"):
        take(tmp_path)
    leave(tmp_path, ELSEWHERE, number, lease.EXPIRY + 60)
    with take(tmp_path) as own:
        assert own.number == number + 1 and own.before == ELSEWHERE
    assert files_in(tmp_path) == []


def test_a_file_that_was_cut_off_counts_until_it_is_old(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "WRITTEN", 0.05)
    path_of(tmp_path, 1).write_text('{"host": "fa')
    refusal = "in use by a process that was cut off while it took the folder$"
    with pytest.raises(Busy, match=refusal):
        take(tmp_path)
    os.utime(path_of(tmp_path, 1), (0, 0))
    take(tmp_path).release()
    assert files_in(tmp_path) == []


def test_a_file_that_gets_its_contents_is_named_by_them(tmp_path):
    path_of(tmp_path, 1).touch()
    later = threading.Timer(0.1, leave, (tmp_path, ELSEWHERE))
    later.start()
    with pytest.raises(Busy, match="in use by process 17 on far"):
        take(tmp_path)
    later.join()


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(lease, "open", lambda *a: FullDisk(open(*a)), raising=False)
        with pytest.raises(OSError, match="No space left"):
            take(tmp_path)
    assert files_in(tmp_path) == []
    take(tmp_path).release()


# --- gaps ---


@pytest.mark.parametrize("number", [2, 5])
def test_a_lone_later_lease_counts_as_any_other(tmp_path, number):
    """As a kill in the middle of a release leaves it."""
    leave(tmp_path, ELSEWHERE, number)
    with pytest.raises(Busy, match="in use by process 17 on far, for 3 h"):
        take(tmp_path)
    assert holder(tmp_path) == ELSEWHERE
    leave(tmp_path, ELSEWHERE, number, 2 * lease.EXPIRY)
    assert holder(tmp_path) is None
    with take(tmp_path) as own:
        own.confirm()
        on_behalf(tmp_path, own.token).confirm()
        assert own.before == ELSEWHERE and holder(tmp_path).token == own.token
        with pytest.raises(Busy, match=f"process {os.getpid()} on"):
            take(tmp_path)
    assert files_in(tmp_path) == []


def test_a_kill_within_a_release_leaves_a_folder_that_can_be_taken(tmp_path, monkeypatch):
    leave(tmp_path, replace(ELSEWHERE, process=GONE), seconds=1000)
    own = take(tmp_path)
    owner, unlink = owner_of(own.path), type(tmp_path).unlink

    def killed(path, missing_ok=False):
        unlink(path, missing_ok)
        if path == path_of(tmp_path, 1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(tmp_path), "unlink", killed)
        own.release()
    assert files_in(tmp_path) == [own.path.name]
    leave(tmp_path, replace(owner, process=GONE), own.number)
    take(tmp_path).release()
    assert files_in(tmp_path) == []


def test_any_lease_below_the_last_counts(tmp_path):
    """The last one is of another who looked too early, and was killed."""
    with take(tmp_path) as own:
        leave(tmp_path, replace(ELSEWHERE, follows="of one that is gone"), 3, 2 * lease.EXPIRY)
        with pytest.raises(Busy, match=f"process {os.getpid()} on"):
            take(tmp_path)
        own.confirm()


def test_all_expired_leases_are_followed(tmp_path):
    """So each owner that slept is told, whatever lies above its lease."""
    own = take(tmp_path)
    owner = owner_of(own.path)
    leave(tmp_path, replace(owner, process=GONE))  # as another machine sees one that sleeps
    leave(tmp_path, replace(ELSEWHERE, token="early"), 3, 2 * lease.EXPIRY)
    with take(tmp_path) as other:
        assert owner_of(other.path).follows.split() == [own.token, "early"]
        with pytest.raises(Lost):
            own.confirm()
    with pytest.raises(Lost):
        own.confirm()
    assert files_in(tmp_path) == []


def test_a_link_to_nowhere_counts_until_it_is_old(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "WRITTEN", 0.05)
    path_of(tmp_path, 1).symlink_to(tmp_path / "nowhere")
    with pytest.raises(Busy, match="a process that was cut off"):
        take(tmp_path)
    os.utime(path_of(tmp_path, 1), (0, 0), follow_symlinks=False)
    take(tmp_path).release()
    assert files_in(tmp_path) == []


def test_who_cannot_succeed_gives_up(tmp_path, monkeypatch):
    """The file that it must create is there whenever it looks, and gone before it can be read."""
    monkeypatch.setattr(lease, "WRITTEN", 0.2)
    monkeypatch.setattr(lease, "leases", lambda folder: {})
    path_of(tmp_path, 1).touch()
    with pytest.raises(Busy, match="in use by other processes that try to take it"):
        take(tmp_path)


def test_an_owner_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.01)
    with take(tmp_path) as own:
        os.utime(own.path, (0, 0))
        end = time.monotonic() + 10
        while own.path.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert time.time() - own.path.stat().st_mtime < 60


def test_who_was_taken_over_is_told_and_removes_nothing(tmp_path):
    own = take(tmp_path)
    owner = owner_of(own.path)
    own.confirm()
    leave(tmp_path, replace(owner, process=GONE))  # as another machine sees one that sleeps
    with take(tmp_path) as other:
        with pytest.raises(Lost, match=f"was taken over by process {os.getpid()}"):
            own.confirm()
        own.release()
        other.confirm()


def test_a_suite_holds_the_lease_for_its_worker(tmp_path):
    with take(tmp_path) as own:
        on_behalf(tmp_path, own.token).confirm()
        with pytest.raises(Lost):
            on_behalf(tmp_path, "another")


@pytest.mark.parametrize("number", [1, 2])
def test_a_file_of_one_who_looked_too_early_is_no_loss(tmp_path, number):
    """It follows a lease that was there before, and withdraws; the owner stays, and can let go."""
    for expired in range(1, number):
        leave(tmp_path, replace(ELSEWHERE, process=GONE), expired, 1000)
    own = take(tmp_path)
    early = path_of(tmp_path, number + 1)
    early.write_text(json.dumps(asdict(replace(ELSEWHERE, follows="of one that is gone"))))
    own.confirm()
    own.release()
    assert files_in(tmp_path) == [early.name]


def test_a_file_that_is_not_written_yet_is_waited_for(tmp_path, monkeypatch):
    own = take(tmp_path)
    path_of(tmp_path, 2).touch()
    later = threading.Timer(0.1, leave, (tmp_path, replace(ELSEWHERE, follows="another"), 2))
    later.start()
    own.confirm()
    later.join()
    path_of(tmp_path, 2).write_bytes(b"")  # its writer was cut off
    monkeypatch.setattr(lease, "WRITTEN", 0.05)
    with pytest.raises(Lost):
        own.confirm()


def test_of_many_that_contend_and_crash_one_alone_is_inside(tmp_path):
    """Each takes the folder, and lets go of it or dies with it, as fast as it can."""
    inside, entries, faults = [], [], []
    start, end = threading.Barrier(8), time.monotonic() + 300

    def contend(seed):
        chance = random.Random(seed)
        start.wait()
        while len(entries) < 200 and time.monotonic() < end:
            try:
                own = take(tmp_path)
            except Busy:
                continue
            inside.append(seed)
            time.sleep(chance.choice((0, 0.001)))
            if inside != [seed]:
                faults.append(list(inside))
            entries.append(seed)
            dies = chance.random() < 0.5
            inside.remove(seed)
            if dies:
                own._released.set()
                dead = replace(owner_of(own.path), process=GONE)
                temporary = tmp_path / f"dead-{seed}"
                temporary.write_text(json.dumps(asdict(dead)))
                os.replace(temporary, own.path)
            else:
                own.release()

    threads = [threading.Thread(target=contend, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == [] and len(entries) >= 200 and len(set(entries)) > 1


def test_ages_have_one_unit():
    assert [lease.age(s) for s in (-3, 59, 119, 300, 7199, 7200, 172799, 172800)] == [
        "0 s", "59 s", "119 s", "5 min", "120 min", "2 h", "48 h", "2 days",
    ]  # fmt: skip
