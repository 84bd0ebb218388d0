from fractions import Fraction
from itertools import product
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.workloads.shares import SLACK, fit_to_costs, plan_shares

SPEED = st.floats(0.05, 5.0)  # ratios to 100


def workers(speed=SPEED, most=8):
    return st.lists(st.tuples(speed, st.integers(1, 20)), min_size=1, max_size=most)


def within(limits, speeds, seconds):
    """Sequences done in that time, with at most ``limits`` each."""
    return sum(min(limit, seconds * speed // 1) for limit, speed in zip(limits, speeds, strict=True))


def least_seconds(number, speeds, limits):
    """The smallest makespan, found by trying every time at which a worker can end."""
    ends = sorted({Fraction(size, s) for s, m in zip(speeds, limits, strict=True) for size in range(1, m + 1)})
    return next(end for end in ends if within(limits, speeds, end) >= number)


@settings(deadline=None)
@given(sequences=st.integers(1, 300), group=workers(), equal=st.booleans(), start=st.integers(0, 10**12))
def test_every_sequence_goes_to_one_worker_in_order_and_within_its_limit(sequences, group, equal, start):
    speeds, limits = zip(*group, strict=True)
    shares = plan_shares(sequences, speeds, limits, equal)
    ranges = shares.ranges(start)
    assert len(ranges) == len(shares.micro_batches) == len(group)
    assert [index for share in ranges for index in share] == list(range(start, start + sequences))
    assert [len(share) for share in ranges] == list(shares.counts)
    for sizes, limit in zip(shares.micro_batches, limits, strict=True):
        assert all(0 <= size <= limit for size in sizes)
    assert shares == plan_shares(sequences, list(speeds), list(limits), equal)


@settings(deadline=None)
@given(sequences=st.integers(1, 60), group=workers(st.integers(1, 100)))
def test_no_other_shares_end_sooner(sequences, group):
    speeds, limits = zip(*group, strict=True)
    seconds = plan_shares(sequences, speeds, limits).seconds(speeds)
    assert seconds == pytest.approx(float(least_seconds(sequences, speeds, [sequences] * len(group))))


@settings(deadline=None)
@given(sequences=st.integers(1, 7), group=workers(most=4))
def test_no_other_shares_end_sooner_by_trying_all_of_them(sequences, group):
    speeds, limits = zip(*group, strict=True)
    every = (counts for counts in product(range(sequences + 1), repeat=len(group)) if sum(counts) == sequences)
    least = min(max(count / speed for count, speed in zip(counts, speeds, strict=True)) for counts in every)
    assert plan_shares(sequences, speeds, limits).seconds(speeds) == least


@settings(deadline=None)
@given(sequences=st.integers(1, 2000), group=workers())
def test_a_large_step_ends_within_a_sequence_a_worker_of_the_ideal(sequences, group):
    speeds, limits = zip(*group, strict=True)
    seconds = plan_shares(sequences, speeds, limits).seconds(speeds)
    assert sequences / sum(speeds) * (1 - 1e-9) <= seconds <= (sequences + len(group)) / sum(speeds) * (1 + 1e-9)


@settings(deadline=None)
@given(sequences=st.integers(1, 300), group=workers())
def test_a_share_is_cut_into_as_few_nearly_equal_micro_batches_as_fit(sequences, group):
    speeds, limits = zip(*group, strict=True)
    shares = plan_shares(sequences, speeds, limits)
    for sizes, count, limit in zip(shares.micro_batches, shares.counts, limits, strict=True):
        assert len(sizes) == ceil(count / limit)
        assert not sizes or max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(sequences=st.integers(1, 40), group=workers(st.integers(1, 100)))
def test_equally_many_micro_batches_end_within_one_of_the_ideal(sequences, group):
    speeds, limits = zip(*group, strict=True)
    shares = plan_shares(sequences, speeds, limits, equal_micro_batches=True)
    assert len({len(sizes) for sizes in shares.micro_batches}) == 1
    assert all(map(any, zip(*shares.micro_batches, strict=True))), "a micro-batch is empty on every worker"
    one = [least_seconds(size, speeds, limits) for size in range(1, min(sequences, sum(limits)) + 1)]
    ideal = [Fraction(0)]  # for 0, 1, 2 … sequences, over all ways to cut them
    for number in range(1, sequences + 1):
        ideal.append(min(one[size - 1] + ideal[number - size] for size in range(1, min(number, len(one)) + 1)))
    best = min(range(1, len(one) + 1), key=lambda size: one[size - 1] / size)
    seconds = shares.seconds(speeds)
    assert float(ideal[-1]) * (1 - 1e-9) <= seconds <= float(ideal[-1] + one[best - 1]) * (1 + SLACK + 1e-9)


@settings(deadline=None)
@given(workers=st.integers(1, 8), micro_batch=st.integers(1, 16), number=st.integers(1, 8), equal=st.booleans())
def test_equal_workers_take_equal_shares_in_the_fewest_micro_batches(workers, micro_batch, number, equal):
    shares = plan_shares(workers * micro_batch * number, [3.7] * workers, [micro_batch] * workers, equal)
    assert shares.micro_batches == ((micro_batch,) * number,) * workers


@pytest.mark.parametrize("equal", [False, True])
def test_unequal_workers_end_together(equal):
    shares = plan_shares(60, [40.0, 10.0, 10.0], [20, 20, 20], equal)
    assert shares.counts == (40, 10, 10)
    assert shares.micro_batches == ((20, 20), (5, 5), (5, 5)) if equal else ((20, 20), (10,), (10,))


def test_a_small_memory_slows_only_workers_that_wait_for_each_other():
    assert plan_shares(50, [4.0, 1.0], [2, 8]).micro_batches == ((2,) * 20, (5, 5))
    together = plan_shares(50, [4.0, 1.0], [2, 8], equal_micro_batches=True)
    assert together.counts == (50, 0)  # a sequence of the slow one takes as long as two micro-batches of the fast one
    assert together.micro_batches[1] == (0,) * 25


@pytest.mark.parametrize("equal", [False, True])
def test_a_worker_may_get_nothing(equal):
    assert plan_shares(3, [1.0] * 5, [4] * 5, equal).counts == (1, 1, 1, 0, 0)
    hopeless = plan_shares(64, [10.0, 10.0, 0.01], [8] * 3, equal)
    assert hopeless.counts == (32, 32, 0)
    assert hopeless.micro_batches[2] == ((0,) * 4 if equal else ())


def test_the_lower_rank_takes_what_is_left_over():
    assert plan_shares(10, [1.0] * 4, [8] * 4).counts == (3, 3, 2, 2)


@pytest.mark.parametrize(
    ("sequences", "speeds", "limits", "message"),
    [
        (8, [], [], "no worker"),
        (8, [1.0, 1.0], [4], "2 speeds but 1 limits"),
        (0, [1.0], [4], "batch of 0 units"),
        (8, [1.0, 0.0], [4, 4], "Worker 1 has a speed of 0.0"),
        (8, [float("nan")], [4], "Worker 0 has a speed of nan"),
        (8, [float("inf")], [4], "Worker 0 has a speed of inf"),
        (8, [1.0], [0], "Worker 0 has a micro-batch limit of 0"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(sequences, speeds, limits, message):
    with pytest.raises(ValueError, match=message):
        plan_shares(sequences, speeds, limits)


@given(
    costs=st.lists(st.floats(0.1, 10), min_size=1, max_size=80), group=workers(st.integers(1, 100)), equal=st.booleans()
)
def test_where_units_differ_in_cost_each_worker_gets_its_part_of_the_cost(costs, group, equal):
    speeds, limits = zip(*group, strict=True)
    planned = plan_shares(len(costs), speeds, limits, equal)
    shares, work = fit_to_costs(planned, costs, limits)
    ranges = shares.ranges(0)
    assert [unit for share in ranges for unit in share] == list(range(len(costs)))
    assert work == pytest.approx([sum(costs[unit] for unit in share) for share in ranges])
    assert all(size <= limit for sizes, limit in zip(shares.micro_batches, limits, strict=True) for size in sizes)
    if equal:
        assert len({len(sizes) for sizes in shares.micro_batches}) == 1
    for count, share, done in zip(planned.counts, ranges, work, strict=True):
        assert count or not share
        wanted = sum(costs) * count / len(costs)
        assert abs(done - wanted) <= max(costs) + 1e-9  # half of a unit at either end


@given(units=st.integers(1, 80), cost=st.floats(0.1, 10), group=workers(st.integers(1, 100)), equal=st.booleans())
def test_units_of_equal_cost_are_shared_out_as_planned(units, cost, group, equal):
    speeds, limits = zip(*group, strict=True)
    planned = plan_shares(units, speeds, limits, equal)
    assert fit_to_costs(planned, [cost] * units, limits)[0] is planned
