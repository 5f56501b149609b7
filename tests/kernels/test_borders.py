"""Kernels and maths do not include torch: tensors end at the glue, and the kernels get raw pointers."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
# The glue: the files that may include torch, directly or through each other.
GLUE = {"ops.h", "batch_norm_ops.h", "registration.h", "cpu/glue.cpp", "cuda/glue.cpp"}
SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}
FILES = sorted(str(p.relative_to(CSRC)) for p in CSRC.rglob("*") if p.suffix in SUFFIXES)
LIBRARY = re.compile(r"(torch|ATen|c10)/")


def includes(name: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"](.+?)[>"]', (CSRC / name).read_text(), re.MULTILINE)


def reached(name: str) -> set[str]:
    """All headers that a file includes, directly or through our own headers."""
    headers, todo = set(), [name]
    while todo:
        file = todo.pop()
        for header in includes(file):
            folders = ((CSRC / file).parent, CSRC, CSRC / "include")
            own = next((f / header for f in folders if (f / header).is_file()), None)
            key = header if own is None else str(own.relative_to(CSRC))
            if key not in headers:
                headers.add(key)
                todo += [] if own is None else [key]
    return headers


def test_the_list_names_files():
    assert GLUE < set(FILES) and len(FILES) > 30


@pytest.mark.parametrize("name", FILES)
def test_only_the_glue_includes_torch(name):
    headers = {header for header in reached(name) if LIBRARY.match(header)}
    assert bool(headers) == (name in GLUE), (
        f"{name} includes {', '.join(sorted(headers)) or 'no torch'}"
    )


def test_no_kernel_includes_the_glue():
    """An include through a folder, such as ../ops.h, would escape the search above."""
    for name in set(FILES) - GLUE:
        names = {Path(header).name for header in includes(name)}
        assert not names & {"ops.h", "batch_norm_ops.h", "registration.h"}, name
