"""What a training costs, and how long it takes by what was measured."""

from types import SimpleNamespace

import pytest
from domainshift import files
from domainshift.records.schema import METRICS
from domainshift.setup import set_up
from domainshift.sweep.estimate import FILE, IMPORTS, Clock, duration, work_of
from paper_data import DATA
from stand_in_worker import ROW

BASE = {"preset": "course-template", "weights": "none", "target": "cartoon", "device": "cpu"}
MINI = BASE | {"limit": 8, "epochs": 3, "image_size": 112, "amp": "off"}
IMAGES = 8 * 7  # of every domain, at a quarter of the pixels

WORK = [  # passes through IMAGES: forward and backward in training, forward in testing
    ({"mode": "baseline"}, 3, 1),
    ({"mode": "baseline", "bn_at_test": "source"}, 3, 2),
    ({"mode": "random", "layers": [1], "p_zero": 0.5}, 3, 1),
    ({"mode": "dropout2d", "layers": [1], "drop_rate": 0.5}, 3, 1),
    ({"mode": "da", "layers": [4]}, 3 * 4 / 3, 1),
    ({"mode": "da", "layers": [4], "mask_sources": ["photo", "sketch"]}, 3 * 5 / 3, 1),
    ({"mode": "dann"}, 3 * 2, 1),
    ({"mode": "adabn"}, 3, 2),
    ({"mode": "baseline", "test_set": "source-train"}, 3, 2),
    ({"mode": "baseline", "evaluate": "each"}, 3, 3),
    ({"mode": "baseline", "target": ["cartoon", "photo", "sketch"]}, 3, 3),
    ({"mode": "baseline", "target": ["cartoon", "photo"], "bn_at_test": "source"}, 3, 3),
    ({"mode": "baseline", "target": ["cartoon", "photo"], "bn_at_test": "target"}, 3, 4),
]


@pytest.mark.parametrize("switches, training, testing", WORK)
def test_what_a_training_costs_follows_from_what_it_does(switches, training, testing):
    setup = set_up(MINI | switches, DATA)
    work = work_of(setup, setup.config.tests())
    assert work == pytest.approx((training * IMAGES / 4, testing * IMAGES / 4))


def test_updates_are_counted_in_batches():
    setup = set_up(BASE | {"updates": 10, "batch_size": 16}, DATA)
    assert work_of(setup, setup.config.tests()).training == 160


def test_held_out_images_are_tested_and_not_trained_on():
    setup = set_up(MINI | {"holdout": 0.25}, DATA)
    work = work_of(setup, setup.config.tests())
    assert work == pytest.approx((3 * 42 / 4, (IMAGES + 14) / 4))


# --- rates ------------------------------------------------------------------------------------


def job_of(**switches):
    setup = set_up(MINI | switches, DATA)
    return SimpleNamespace(name=str(switches), setup=setup, tests=setup.config.tests())


def clock(tmp_path, share=2, size=1):
    return Clock(tmp_path / "rates.json", "cpu", "a processor", share, size)


def measured(tmp_path, train=10.0, test=2.0, other=3.0, **switches):
    """A clock that has seen one training."""
    folder = tmp_path / "a"
    folder.mkdir(exist_ok=True)
    (folder / METRICS).unlink(missing_ok=True)
    files.append_json_line(
        folder / METRICS, ROW | {"train_seconds": train, "seconds": train + test}
    )
    result = clock(tmp_path)
    result.learn(folder, job_of(**switches), train + test + other)
    return result


def test_an_equal_training_takes_what_the_last_one_took(tmp_path):
    measured(tmp_path)
    assert clock(tmp_path).seconds(job_of()) == pytest.approx(15)


def test_start_training_and_testing_are_apart(tmp_path):
    after = measured(tmp_path)
    assert after.seconds(job_of(epochs=6)) == pytest.approx(3 + 20 + 2)
    assert after.seconds(job_of(evaluate="each")) == pytest.approx(3 + 10 + 6)
    assert after.seconds(job_of(mode="dann")) == pytest.approx(3 + 20 + 2)


def test_another_size_or_share_is_scaled(tmp_path):
    after = measured(tmp_path)
    assert after.seconds(job_of(image_size=224)) == pytest.approx(3 + 4 * 12)
    assert clock(tmp_path, share=1).seconds(job_of()) == pytest.approx(3 + 2 * 12)


def test_the_nearest_size_counts(tmp_path):
    measured(tmp_path)
    after = measured(tmp_path, train=100.0, image_size=224)
    assert after.seconds(job_of(epochs=6)) == pytest.approx(3 + 20 + 2)
    assert after.seconds(job_of(image_size=224)) == pytest.approx(3 + 100 + 2)


def test_new_measurements_replace_old_ones_little_by_little(tmp_path):
    for _ in range(20):
        measured(tmp_path, train=10.0)
    assert clock(tmp_path).seconds(job_of()) == pytest.approx(15)
    for _ in range(10):
        measured(tmp_path, train=20.0)
    assert clock(tmp_path).seconds(job_of()) == pytest.approx(25, rel=0.02)
    (rate,) = FILE.validate_python(files.read_json(tmp_path / "rates.json"))
    assert rate.runs == 30


def test_another_machine_network_or_precision_is_a_guess(tmp_path):
    after = measured(tmp_path)
    for other in (job_of(amp="bfloat16"), job_of(model="resnet50")):
        assert after.rate(other.setup.config) is None
        assert after.basis([other]) == "a guess: nothing was measured on a processor yet"
    assert after.basis([job_of()]) == "measured on a processor"
    both = after.basis([job_of(), job_of(amp="bfloat16")])
    assert both == "measured on a processor, but guessed for 1 trainings"


def test_several_at_a_time_take_less_but_not_less_than_the_longest(tmp_path):
    measured(tmp_path)
    jobs = [job_of(), job_of(), job_of(epochs=9)]
    seconds = [15, 15, 35]
    assert clock(tmp_path).left(jobs) == pytest.approx(sum(seconds))
    assert clock(tmp_path, size=2).left(jobs) == pytest.approx(35)
    assert clock(tmp_path).left(jobs, imports=True) == pytest.approx(sum(seconds) + IMPORTS)
    assert clock(tmp_path).left([], imports=True) == 0


@pytest.mark.parametrize("content", ["", "[1]", '[{"device": 3}]'])
def test_a_file_that_cannot_be_read_is_no_measurement(tmp_path, content):
    (tmp_path / "rates.json").write_text(content)
    assert clock(tmp_path).rates == []
    assert len(measured(tmp_path).rates) == 1


@pytest.mark.parametrize(
    "seconds, words",
    [(3, "3 s"), (89, "89 s"), (100, "2 min"), (7000, "117 min"), (9000, "2.5 h"), (260000, "3.0 days")],
)  # fmt: skip
def test_durations(seconds, words):
    assert duration(seconds) == words
