"""A passing tenant's memory makes one host's micro-batches smaller for a while, and nobody else's."""

from cluster.workloads.memory_limit import FIRST_SECONDS, LONGEST_SECONDS, MemoryLimit


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_lowered_limit_expires_and_is_lowered_for_longer_where_it_fails_again():
    clock = Clock()
    limit = MemoryLimit(clock)
    assert limit.now == 0
    limit.find(16, "a phase")
    assert limit.now == 16
    span = FIRST_SECONDS
    for _ in range(8):
        limit.lower(8)
        clock.now += span - 1
        assert limit.now == 8
        clock.now += 1
        assert limit.now == 16
        span = min(2 * span, LONGEST_SECONDS)


def test_a_limit_that_is_lowered_step_by_step_holds_no_longer_for_that():
    clock = Clock()
    limit = MemoryLimit(clock)
    limit.find(16, "a phase")
    for size in (8, 4, 2):
        limit.lower(size)
    assert limit.now == 2
    clock.now += FIRST_SECONDS
    assert limit.now == 16


def test_other_work_begins_without_what_was_lowered():
    limit = MemoryLimit(Clock())
    limit.find(16, "a phase")
    limit.lower(2)
    limit.find(12, "a phase")
    assert limit.now == 2
    limit.find(40, "another")
    assert limit.now == 40


def test_a_later_probe_that_finds_less_counts_at_once():
    limit = MemoryLimit(Clock())
    limit.find(16, "a phase")
    limit.lower(8)
    limit.find(4, "a phase")
    assert limit.now == 4
