"""What happens, when and to whom follows from the seed."""

import math
from itertools import islice, pairwise
from statistics import mean, stdev
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.chaos.chaos_command import Settings, disturb
from cluster.chaos.disturbances import Kind, Victim, choose, choose_node, schedule
from doge.common.config_tree import parse
from doge.common.errors import UserError

seeds = st.integers(0, 2**32)
kinds = st.lists(st.sampled_from(get_args(Kind)), min_size=1).map(tuple)
seconds = st.floats(0.1, 1e3)


@st.composite
def memberships(draw) -> list[Victim]:
    ranks = draw(st.permutations(range(draw(st.integers(0, 6)))))
    spares = [None] * draw(st.integers(0, 3))
    nodes = st.sampled_from(["head", "east", "west"])
    return [Victim(f"host-{n}", draw(nodes), 100 + n, rank, 7) for n, rank in enumerate([*ranks, *spares])]


@given(seeds, seconds, kinds, st.floats(0, 20))
def test_the_schedule_is_a_pure_function_of_the_seed_and_a_longer_one_only_adds(seed, every, kinds, times):
    short = list(schedule(seed, every, kinds, every * times))
    assert short == list(islice(schedule(seed, every, kinds), len(short)))
    assert [event.number for event in short] == list(range(1, len(short) + 1))
    assert all(before.at < after.at for before, after in pairwise(short))
    assert all(0 < event.at < every * times and event.kind in kinds for event in short)


def test_events_come_as_often_as_asked_and_kinds_as_often_as_named():
    events = list(islice(schedule(1, 30.0, ("pause", "pause", "kill-node")), 20_000))
    gaps = [after.at - before.at for before, after in pairwise(events)]
    assert mean(gaps) == pytest.approx(30, rel=0.03)
    assert stdev(gaps) == pytest.approx(30, rel=0.05)  # an exponential distribution's is its mean
    assert mean(event.kind == "pause" for event in events) == pytest.approx(2 / 3, abs=0.02)


@given(memberships(), st.data(), seeds, st.integers(1, 100), st.booleans())
def test_the_victim_follows_from_the_members_in_any_order(members, data, seed, number, spares):
    shuffled = data.draw(st.permutations(members))
    victim = choose(members, seed, number, spares=spares)
    assert victim == choose(shuffled, seed, number, spares=spares)
    training = [member for member in members if member.rank is not None]
    assert victim in (members if spares else training) or (victim is None and not (members if spares else training))
    first = choose(members, seed, number, rank=0)
    assert first == next((member for member in members if member.rank == 0), None)

    node = choose_node(members, ["head"], seed, number)
    assert node == choose_node(shuffled, ["head"], seed, number)
    assert node in {member.node for member in training} - {"head"} or node is None


def test_every_worker_meets_its_share_of_the_events():
    members = [Victim(f"host-{rank}", "east", rank, rank, 0) for rank in range(4)]
    ranks = [choose(members, 3, number).rank for number in range(4_000)]
    assert all(ranks.count(rank) == pytest.approx(1_000, rel=0.1) for rank in range(4))


def plan(*arguments: str) -> list[str]:
    lines: list[str] = []
    disturb(parse(Settings, Settings(), [*arguments, "--dry-run"], ""), lambda line: lines.append(str(line)))
    return lines


def test_a_dry_run_prints_the_seed_and_the_same_events_again():
    first, *events = plan("--every", "20", "--duration", "300", "--kinds", "pause", "throttle")
    seed = first.removeprefix("Seed ")
    assert events
    assert plan("--every", "20", "--duration", "300", "--kinds", "pause", "throttle", "--seed", seed)[1:] == events
    assert plan("--seed", "7")[-1].endswith("and so on")


def test_explicit_events_come_in_the_order_of_their_times():
    lines = plan("--at", "60", "kill-node", "2.5", "pause")
    assert [line.split() for line in lines[1:]] == [["2.5", "s", "pause"], ["60.0", "s", "kill-node"]]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"every": 0.0}, "--every must be above 0"),
        ({"duration": -1.0}, "--duration must be above 0"),
        ({"throttle_share": 1.5}, "below 1, not 1.5"),
        ({"pause_seconds": math.inf}, "--pause-seconds must be"),
        ({"kinds": ()}, "--kinds needs at least one of kill-worker"),
        ({"at": ((-3.0, "pause"),)}, "not negative"),
    ],
)
def test_a_wrong_setting_is_a_sentence(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        Settings(**wrong)
