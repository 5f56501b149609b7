"""PACS without its images: what a plan asks of a data set. And the plans of the suites."""

import functools
from unittest import mock

from domainshift.config import Test
from domainshift.sweep.plan import Setups, expand
from domainshift.sweep.schema import read_suite

COUNTS = {
    "art_painting": (379, 255, 285, 184, 201, 295, 449),
    "cartoon": (389, 457, 346, 135, 324, 288, 405),
    "photo": (189, 202, 182, 186, 199, 280, 432),
    "sketch": (772, 740, 753, 608, 816, 80, 160),
}


class PaperData:
    name = "PACS"
    classes = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    domains = tuple(COUNTS)
    defaults = {}
    remarks = ()

    def counts(self, domain, limit=None):
        return [n if limit is None else min(n, limit) for n in COUNTS[domain]]

    def digest(self, domain, limit=None):
        return f"{domain} {limit}"


DATA = PaperData()


def on_paper():
    """A context in which plans need no images."""
    return mock.patch.object(Setups, "data_of", lambda *_: DATA)


def expanded(name, profile="full", device="cpu", **forced):
    with on_paper():
        return expand(read_suite(name).in_profile(profile), forced, device)


@functools.cache
def plan_of(name, profile="full"):
    return expanded(name, profile, weights="none", data="PACS")


def table_of(plan, name):
    (table,) = [table for table in plan.tables if table.name == name]
    return table


def cells(plan, table):
    """(arm, cell) of each evaluation in a table."""
    return [(arm.name, cell) for arm in table_of(plan, table).arms for cell in arm.cells]


def switches(plan, cell):
    """Every switch of an evaluation: those of its training, and how it is tested."""
    (job,) = [job for job in plan.jobs if job.name == cell.training]
    (test,) = [test for test in job.tests if test.name == cell.test]
    assert isinstance(test, Test) and test.domain == cell.target
    config = job.setup.config.as_dict()
    return config | {"target": test.domain, "at_eval": test.at_eval, "bn_at_test": test.bn}


def arms(plan, table):
    """Switches by arm, of the first evaluation of each arm of a table."""
    return {arm.name: switches(plan, arm.cells[0]) for arm in table_of(plan, table).arms}
