"""Times a contender and fastshape in turn, in one process, so that other load on the machine affects both."""

import statistics
import time

import pytest


@pytest.fixture
def against(benchmark):
    """``against(ours, theirs, bytes)``: pytest-benchmark times `theirs`, and in each round `ours` runs just before it.

    ``prepare`` is called before each of the two and is not timed. It fills tensors again that are shaped in place.

    ``extra_info`` gets ``ours_ms`` and ``theirs_ms`` (medians), ``ratio`` (the median over rounds of theirs / ours, above 1
    if ours is faster) and ``bytes``, the bytes that one call must move.
    """

    def run(
        ours,
        theirs,
        moved_bytes: int,
        rounds: int = 7,
        warmup_rounds: int = 2,
        prepare=lambda: None,
    ) -> None:
        our_seconds = []

        def time_ours():
            prepare()
            start = time.perf_counter()
            ours()
            our_seconds.append(time.perf_counter() - start)
            prepare()

        benchmark.pedantic(theirs, setup=time_ours, rounds=rounds, warmup_rounds=warmup_rounds)
        our_seconds = our_seconds[-rounds:]  # drop the warm-up rounds
        their_seconds = benchmark.stats.stats.data
        ratios = [b / a for a, b in zip(our_seconds, their_seconds, strict=True)]
        benchmark.extra_info.update(
            ours_ms=1e3 * statistics.median(our_seconds),
            theirs_ms=1e3 * statistics.median(their_seconds),
            ratio=statistics.median(ratios),
            bytes=moved_bytes,
        )

    return run
