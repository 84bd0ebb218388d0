import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.workloads.pace import PROBE, STEPS_BETWEEN, Pace
from cluster.workloads.shares import plan_shares

SEEDS = st.integers(0, 10**6)


def took(counts, speeds):
    return [count / speed for count, speed in zip(counts, speeds, strict=True)]


def noisy(counts, speeds, rng, noise=0.1):
    return [seconds * rng.uniform(1 - noise, 1 + noise) for seconds in took(counts, speeds)]


class Throttled:
    """A worker that is halted for two thirds of every cycle, as by SIGSTOP and SIGCONT."""

    def __init__(self, cycle):
        self.cycle, self.runs = cycle, cycle / 3

    def seconds(self, start, work):
        """From ``start`` until ``work`` seconds of running are done."""
        cycles, phase = divmod(start, self.cycle)
        left = max(self.runs - phase, 0.0)  # of this cycle
        if work <= left:
            return work
        more, rest = divmod(work - left, self.runs)
        return (cycles + 1 + more) * self.cycle + rest - start


@settings(max_examples=20, deadline=None, derandomize=True)  # five standard deviations are not infinitely many
@given(workers=st.integers(1, 8), seed=SEEDS, known=st.booleans())
def test_noise_changes_no_plan(workers, seed, known):
    rng, speeds = random.Random(seed), [3.0] * workers
    pace = Pace(64, [8] * workers, False, speeds if known else [None] * workers)
    for _ in range(100):
        assert not pace.observe(noisy(pace.shares.counts, speeds, rng))


@settings(max_examples=30, deadline=None)
@given(workers=st.integers(2, 8), seed=SEEDS, step=st.integers(0, 59), pause=st.floats(1.5, 50.0))
def test_one_pause_changes_no_plan(workers, seed, step, pause):
    rng, speeds = random.Random(seed), [3.0] * workers
    pace = Pace(64, [8] * workers, False, speeds)
    paused = rng.randrange(workers)
    for now in range(60):
        seconds = noisy(pace.shares.counts, speeds, rng, 0.05)
        if now == step:
            seconds[paused] *= pause if step else 1.5  # a first measurement is believed halfway, see below
        assert not pace.observe(seconds)


def test_a_small_but_steady_change_is_followed_too():
    rng, speeds = random.Random(1), [10.0, 10.0]
    pace = Pace(128, [8] * 2, False, speeds)
    for speed in (8.0, 10.0):
        for _ in range(50):
            pace.observe(noisy(pace.shares.counts, speeds, rng, 0.02))
        speeds[0] = speed
        for _ in range(12):
            pace.observe(noisy(pace.shares.counts, speeds, rng, 0.02))
        assert pace.shares.seconds(speeds) <= 1.03 * plan_shares(128, speeds, [8] * 2).seconds(speeds)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("workers", [2, 4, 7])
def test_a_throttled_worker_is_followed_within_five_steps_and_back(workers, equal):
    rng, speeds = random.Random(workers), [10.0] * workers
    pace = Pace(16 * workers, [4] * workers, equal, [None] * workers)
    for speed, steps in ((10.0, 20), (10.0 / 3, 5), (10.0 / 3, 20), (10.0, 5)):
        speeds[-1] = speed
        for _ in range(steps):
            pace.observe(noisy(pace.shares.counts, speeds, rng, 0.05))
        ideal = plan_shares(16 * workers, speeds, [4] * workers, equal).seconds(speeds)
        assert pace.shares.seconds(speeds) <= 1.15 * ideal
        assert pace.speeds[-1] == pytest.approx(speed, rel=0.1)


@settings(max_examples=50, deadline=None)
@given(speeds=st.lists(st.floats(0.05, 5.0), min_size=1, max_size=8), batch=st.integers(1, 128), equal=st.booleans())
def test_unknown_speeds_are_found_in_a_few_steps(speeds, batch, equal):
    limits = [8] * len(speeds)
    pace = Pace(batch, limits, equal, [None] * len(speeds))
    for _ in range(2 + 2 * STEPS_BETWEEN):
        pace.observe(took(pace.shares.counts, speeds))
    ideal = plan_shares(batch, speeds, limits, equal)
    # A worker without sequences is tried now and then, at the cost of a step: see the idle workers below.
    if all(ideal.counts) and all(pace.shares.counts):
        assert pace.shares.seconds(speeds) <= 1.15 * ideal.seconds(speeds)


def test_a_warm_up_is_believed_halfway_and_then_forgotten():
    pace = Pace(64, [8] * 4, False, [4.0] * 4)
    seconds = took(pace.shares.counts, [4.0] * 4)
    seconds[0] *= 9  # compiling
    pace.observe(seconds)
    assert pace.speeds[0] == pytest.approx(4.0 / 3)
    assert pace.shares.counts[0] > 0
    for _ in range(STEPS_BETWEEN):
        pace.observe(took(pace.shares.counts, [4.0] * 4))
    assert pace.shares.counts == (16,) * 4


@settings(max_examples=30, deadline=None)
@given(workers=st.integers(1, 8), batch=st.integers(1, 100), equal=st.booleans(), seed=SEEDS)
def test_the_same_numbers_give_the_same_plans(workers, batch, equal, seed):
    rng = random.Random(seed)
    speeds = [rng.choice([None, rng.uniform(0.1, 10)]) for _ in range(workers)]
    limits = [rng.randint(1, 8) for _ in range(workers)]
    one, other = (Pace(batch, limits, equal, speeds) for _ in range(2))
    for _ in range(60):
        seconds = [rng.choice([0.0, rng.uniform(0.1, 1), rng.uniform(1, 30)]) for _ in range(workers)]
        assert one.observe(seconds) == other.observe(seconds)
        assert (one.shares, one.speeds) == (other.shares, other.speeds)
        assert sum(one.shares.counts) == batch


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, workers=st.integers(2, 8), equal=st.booleans())
def test_a_plan_is_kept_for_some_steps_however_wild_the_numbers(seed, workers, equal):
    rng = random.Random(seed)
    pace, changes = Pace(16 * workers, [4] * workers, equal, [1.0] * workers), [-STEPS_BETWEEN]
    for step in range(100):
        if not all(pace.shares.counts):
            return  # a worker without sequences is probed for one step
        if pace.observe([rng.uniform(1, 20) for _ in range(workers)]):
            assert step - changes[-1] >= STEPS_BETWEEN
            changes.append(step)


@pytest.mark.parametrize("cycle", [0.05, 0.3, 1.0, 3.0])  # of steps that take about 1 s
@pytest.mark.parametrize("workers", [2, 4, 7])
def test_sixty_steps_beside_a_throttled_worker_take_little_more_than_with_the_right_plan_from_the_start(workers, cycle):
    batch, speed, limits = 16 * workers, 16.0, [8] * workers
    throttled = Throttled(cycle)

    def run(pace, plan):
        rng, now = random.Random(7), 0.0
        for _ in range(60):
            counts = pace.shares.counts if pace else plan.counts
            work = noisy(counts, [speed] * workers, rng, 0.03)
            seconds = [throttled.seconds(now, work[0]), *work[1:]]
            if pace:
                pace.observe(seconds)
            now += max(seconds)
        return now

    right = run(None, plan_shares(batch, [speed / 3] + [speed] * (workers - 1), limits))
    equal = run(None, plan_shares(batch, [speed] * workers, limits))
    followed = run(Pace(batch, limits, False, [None] * workers), None)
    print(f"{followed / right:.3f} of the right plan, {followed / equal:.3f} of equal shares")
    assert followed <= 1.1 * right
    assert followed <= 0.75 * equal


@pytest.mark.parametrize("equal", [False, True])
def test_a_worker_without_sequences_is_tried_now_and_then_at_little_cost(equal):
    speeds, limits = [10.0, 10.0, 0.1], [8] * 3
    pace, total, tried = Pace(32, limits, equal, speeds), 0.0, 0
    assert pace.shares.counts[2] == 0
    for _ in range(1000):
        tried += pace.shares.counts[2] > 0
        total += pace.shares.seconds(speeds)
        pace.observe(took(pace.shares.counts, speeds))
    assert tried >= 3
    assert total <= 1.15 * 1000 * plan_shares(32, speeds, limits, equal).seconds(speeds)


@pytest.mark.parametrize("equal", [False, True])
def test_a_worker_without_sequences_comes_back_when_it_is_fast_again(equal):
    pace, speeds = Pace(32, [8] * 3, equal, [10.0, 10.0, 0.1]), [10.0] * 3
    steps = int(PROBE * 10.0 / 1.6) + 10  # until the others have worked PROBE × 10 s
    for _ in range(steps):
        pace.observe(took(pace.shares.counts, speeds))
    assert sorted(pace.shares.counts) == [10, 11, 11]


def test_more_workers_than_sequences_all_get_their_turn():
    pace, had = Pace(2, [1] * 5, False, [None] * 5), set()
    for _ in range(5 * PROBE):
        had |= {rank for rank, count in enumerate(pace.shares.counts) if count}
        pace.observe(took(pace.shares.counts, [1.0] * 5))
    assert had == set(range(5))


def test_unknown_speeds_are_taken_for_the_mean_of_the_known():
    assert Pace(8, [4] * 3, False, [2.0, None, 6.0]).speeds == [2.0, 4.0, 6.0]
    assert Pace(8, [4] * 2, False, [None, None]).shares.counts == (4, 4)


def test_what_was_not_measured_changes_nothing():
    pace = Pace(8, [4] * 2, False, [2.0, 4.0])
    for missing in (0.0, float("nan"), float("inf"), -1.0):
        assert not pace.observe([missing, missing])
    assert pace.speeds == [2.0, 4.0]


def test_a_step_made_by_an_earlier_plan_is_only_remembered():
    pace = Pace(32, [8] * 2, False, [1.0, 1.0])
    for _ in range(10):
        assert not pace.observe([10.0, 2.0], counts=(20, 12))
    assert pace.speeds == [2.0, 6.0]
    assert pace.observe([8.0, 16 / 6])
    assert pace.shares.counts == (8, 24)


@pytest.mark.parametrize("equal", [False, True])
def test_a_smaller_limit_is_kept_at_once(equal):
    pace = Pace(32, [8] * 2, equal, [1.0, 1.0])
    pace.set_limit(1, 2)
    assert max(pace.shares.micro_batches[1]) <= 2
    assert sum(pace.shares.counts) == 32
    with pytest.raises(ValueError, match="limit of 0"):
        pace.set_limit(1, 0)
    assert pace.limits == [8, 2]


def test_nonsense_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="2 workers made the step, but 1 times"):
        Pace(8, [4] * 2, False, [1.0, 1.0]).observe([1.0])
    with pytest.raises(ValueError, match="Worker 0 has a speed of -1"):
        Pace(8, [4], False, [-1.0])
