"""The schema of the records is their documentation."""

import inspect

import pytest
from domainshift.config import Test
from domainshift.records import schema

RECORDS = [
    kind
    for kind in vars(schema).values()
    if inspect.isclass(kind) and issubclass(kind, schema.Record) and kind is not schema.Record
]


@pytest.mark.parametrize("kind", [*RECORDS, Test])
def test_every_field_is_explained(kind):
    assert kind.__doc__
    for name, field in kind.model_fields.items():
        assert field.description, f"{kind.__name__}.{name}"


def test_a_record_takes_no_other_fields_and_no_nan():
    count = {"correct": 1, "total": 2, "loss": 0.5, "batch_loss": 0.25}
    schema.Count(**count)
    for wrong in ({"loss": float("nan")}, {"more": 1}):
        with pytest.raises(ValueError):
            schema.Count(**count | wrong)
