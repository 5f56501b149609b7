"""A contender is timed in turn with fastshape, in one process: what the machine does meanwhile, it does to both."""

import statistics
import time

import pytest


@pytest.fixture
def against(benchmark):
    """``against(ours, theirs, bytes)``: pytest-benchmark times `theirs`; each round, `ours` runs just before it.

    ``prepare`` is called before each of the two, untimed: what is shaped in place must be filled anew.

    Records in ``extra_info``: ``ours_ms`` and ``theirs_ms`` (medians), ``ratio`` (median of the ratios of
    neighbours, above 1 where ours is faster), and ``bytes``, what the byte model says one call must move.
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
        our_seconds = our_seconds[-rounds:]  # without the warm-up's
        their_seconds = benchmark.stats.stats.data
        ratios = [b / a for a, b in zip(our_seconds, their_seconds, strict=True)]
        benchmark.extra_info.update(
            ours_ms=1e3 * statistics.median(our_seconds),
            theirs_ms=1e3 * statistics.median(their_seconds),
            ratio=statistics.median(ratios),
            bytes=moved_bytes,
        )

    return run
