"""Who counts as stuck, silent or slow, as tables: by the progress that hosts tell of, not by the age of a phase."""

from dataclasses import replace

import pytest
from known_hosts import answers, host, known, of, passing, running

from cluster.elastic.decisions.commands import (
    Abort,
    AskForBeat,
    AskForOffer,
    KillHost,
)
from cluster.elastic.decisions.decide import decide
from cluster.elastic.decisions.ending import ABORT_SECONDS
from cluster.elastic.decisions.known import (
    Gathering,
    Questioning,
)
from cluster.elastic.decisions.observations import (
    BeatHeard,
    HostFailed,
    MemberEnded,
    Tick,
)
from cluster.elastic.decisions.watching import (
    BUILD_SECONDS,
    KILL_SECONDS,
    SILENT_SECONDS,
    STALL_SECONDS,
    grace,
)
from cluster.elastic.membership import Outcome, StateId
from cluster.elastic.workload import Beat, Stage
from cluster.machines.scaling import ScalingRecipe

HANG = ScalingRecipe().hang_timeout_s


@pytest.mark.parametrize(
    ("beat", "gpus", "seconds"),
    [
        (Beat(Stage.STEPPING, waiting=True), (), KILL_SECONDS),
        (Beat(Stage.BUILDING, waiting=True), (), KILL_SECONDS),
        (Beat(Stage.STEPPING, waiting=True, step_seconds=99.0), (), KILL_SECONDS),
        (Beat(Stage.BUILDING), (), BUILD_SECONDS),
        (Beat(Stage.STEPPING), (), HANG),
        (Beat(Stage.STEPPING, step_seconds=100.0), (), 300.0),
        (Beat(Stage.STEPPING), ("0",), HANG),  # a first step may compile
        (Beat(Stage.STEPPING, step_seconds=1.0), ("0",), KILL_SECONDS),
        (Beat(Stage.STEPPING, step_seconds=10.0), ("0",), 30.0),
        (Beat(Stage.BETWEEN), ("0",), HANG),
        (Beat(Stage.JOINING), (), HANG),
        (Beat(Stage.JOINING, waiting=True), (), BUILD_SECONDS),
        (Beat(Stage.CLOSING), (), HANG),
    ],
)
def test_how_long_a_member_may_take_to_end_a_membership_that_lost_another(beat, gpus, seconds):
    member = host("a1", beat=beat, gpus=gpus)
    assert grace(known(member), member) == seconds


@pytest.mark.parametrize(
    ("beat", "longest", "still", "stuck"),
    [
        (Beat(Stage.STEPPING), 0.0, 10 * HANG - 1, False),
        (Beat(Stage.STEPPING), 0.0, 10 * HANG + 1, True),  # its first pass: nobody knows how long one takes
        (Beat(Stage.STEPPING), 1.0, HANG - 1, False),
        (Beat(Stage.STEPPING), 1.0, HANG + 1, True),
        (Beat(Stage.STEPPING), 10.0, HANG + 1, False),  # within the time of twenty passes
        (Beat(Stage.STEPPING), 10.0, 201.0, True),
        (Beat(Stage.STEPPING, waiting=True), 1.0, 1e6, False),  # another one is
        (Beat(Stage.JOINING, waiting=True), 1.0, 1e6, False),
        (Beat(Stage.IDLE), 1.0, 1e6, False),
        (Beat(Stage.BETWEEN, "data"), 0.0, 10 * HANG - 1, False),
        (Beat(Stage.BETWEEN, "data"), 0.0, 10 * HANG + 1, True),
        (Beat(Stage.BETWEEN, "evaluation"), 1.0, 10 * HANG + 1, True),
        (Beat(Stage.BETWEEN, "commit"), 1.0, 10 * HANG - 1, False),  # its storage is slow
        (Beat(Stage.BETWEEN, "commit"), 1.0, 10 * HANG + 1, True),
        (Beat(Stage.BUILDING, "engine"), 0.0, 10 * HANG + 1, True),
        (Beat(Stage.CLOSING, "closing"), 1.0, 10 * HANG + 1, True),
    ],
)
def test_a_host_that_does_not_move_is_lost_unless_it_waits(beat, longest, still, stuck):
    state = running(host("a1", moved=100.0), host("b1", moved=100.0 - still, longest=longest))
    state.hosts["b1"].beat = beat
    commands = decide(state, Tick(), 100.0)
    assert bool(of(KillHost, commands)) == stuck
    doing = "a step" if beat.stage is Stage.STEPPING else beat.activity
    assert state.hosts["b1"].reason == (f"no progress in {doing} for {still:.0f} seconds" if stuck else "")


def test_a_step_of_an_hour_is_no_hang_while_its_micro_batches_are_made():
    state = running(host("a1", moved=100.0), host("b1", moved=100.0))
    for pass_ in range(180):  # of 20 seconds
        beats = {name: Beat(Stage.STEPPING, membership=1, progress=pass_) for name in ("a1", "b1")}
        assert not of(KillHost, passing(state, 120.0 + 20 * pass_, beats))
    commands = passing(state, state.now + 21 * 20, {"a1": beats["a1"]} | {"b1": replace(beats["b1"], progress=999)})
    assert [command.host for command in of(KillHost, commands)] == ["a1"]


@pytest.mark.parametrize(("seconds", "lost"), [(10 * HANG - 1, False), (10 * HANG + 1, True)])
def test_a_start_that_hangs_is_a_failed_start(seconds, lost):
    state = known(host("a1"), host("b1", info=None, started=100.0 - seconds))
    commands = decide(state, Tick(), 100.0)
    assert [command.host for command in of(KillHost, commands)] == (["b1"] if lost else [])
    if lost:
        assert [failed.reason for failed in state.failed_starts] == ["not ready after 601 seconds"]


def test_an_offer_that_never_comes_is_waited_for_no_longer():
    state = known(host("a1"), host("b1"))
    decide(state, Tick(), 100.1)
    assert of(AskForOffer, answers(state, StateId(3, 1), None))
    beats = {name: Beat(Stage.IDLE) for name in ("a1", "b1")}
    assert not of(KillHost, passing(state, 100.0 + 10 * HANG, beats))
    assert [command.host for command in of(KillHost, passing(state, 102.0 + 10 * HANG, beats))] == ["a1"]


@pytest.mark.parametrize(
    ("beats", "stalled"),
    [
        ({"a1": True, "b1": True}, False),  # all answer; below it is told how long they may wait
        ({"a1": True}, True),  # b1 says nothing: its plug was pulled
        ({"a1": False}, False),  # a1 computes: nobody is waited for yet
    ],
)
def test_a_membership_that_waits_for_a_silent_one_is_ended_and_its_survivor_kept(beats, stalled):
    state = running(host("a1", moved=100.0), host("b1", moved=100.0), hang_timeout_s=60)
    heard = {name: Beat(Stage.STEPPING, membership=1, waiting=waiting) for name, waiting in beats.items()}
    commands = passing(state, 100.0 + SILENT_SECONDS + ABORT_SECONDS + 2, heard)
    assert not of(KillHost, commands)
    assert {command.host for command in of(Abort, commands)} == ({"a1", "b1"} if stalled else set())
    if stalled:
        commands = decide(state, MemberEnded("a1", Outcome("broken", 5, "A worker is gone")), state.now + 0.1)
        commands += passing(state, state.now + 1, {"a1": Beat(Stage.IDLE, held=StateId(5, 1))})
        assert state.hosts["b1"].given_up is not None
        assert of(AskForOffer, commands) or isinstance(state.phase, Gathering | Questioning)


def test_members_that_all_wait_for_each_other_without_an_end_are_told_to_stop():
    state = running(host("a1", moved=100.0), host("b1", moved=100.0))
    beats = {name: Beat(Stage.STEPPING, membership=1, waiting=True) for name in ("a1", "b1")}
    assert not of(Abort, passing(state, 100.0 + STALL_SECONDS, beats))
    assert len(of(Abort, passing(state, 100.0 + STALL_SECONDS + ABORT_SECONDS + 2, beats))) == 2


def test_gathering_a_large_state_is_no_stall():
    state = running(host("a1", moved=100.0), host("b1", moved=100.0))
    beats = {name: Beat(Stage.BETWEEN, "commit", membership=1, waiting=True) for name in ("a1", "b1")}
    assert not of(Abort, passing(state, 100.0 + 5 * STALL_SECONDS, beats))


def test_a_slow_exchange_is_no_stall():
    state = running(host("a1", moved=100.0), host("b1", moved=100.0))
    for piece in range(20):
        beats = {name: Beat(Stage.STEPPING, membership=1, waiting=True, progress=piece) for name in ("a1", "b1")}
        assert not of(Abort, passing(state, 110.0 + 10 * piece, beats))


def test_a_survivor_that_waited_for_a_lost_one_is_not_taken_for_stuck():
    state = running(host("a1"), host("b1"))
    decide(state, HostFailed("b1", "ActorDiedError", died=True), 100.1)
    assert not of(KillHost, decide(state, BeatHeard("a1", Beat(Stage.STEPPING)), 100.2))


@pytest.mark.parametrize(("silent_s", "lost"), [(HANG - 1, False), (HANG + 2, True)])
def test_a_silent_host_is_lost(silent_s, lost):
    state = running(host("a1"), host("b1", asked=True))
    commands = passing(state, 100.0 + silent_s, {"a1": Beat(Stage.STEPPING, membership=1, waiting=False)})
    assert [command.host for command in of(KillHost, commands)] == (["b1"] if lost else [])


def test_the_pause_of_a_coordinator_that_was_itself_stopped_is_nobodys_silence():
    """Its machine was suspended for an hour; answers wait to be heard, and nobody has moved since."""
    state = running(
        host("a1", moved=100.0, longest=1.0), host("b1", asked=True), others=(host("c1", info=None, started=99.0),)
    )
    commands = [*decide(state, Tick(), 3700.0), *decide(state, Tick(), 3700.5)]
    assert not of(KillHost, commands)
    assert not of(Abort, commands)
    assert all(state.answers(each) for each in state.hosts.values())


def test_a_question_that_a_host_leaves_open_stays_the_only_one():
    state = running(host("a1"), host("b1"))
    assert of(AskForBeat, decide(state, Tick(), 100.5)) == [AskForBeat("a1"), AskForBeat("b1")]
    decide(state, BeatHeard("a1", Beat(Stage.STEPPING)), 100.6)
    assert of(AskForBeat, decide(state, Tick(), 101.0)) == [AskForBeat("a1")]


def test_an_answer_that_comes_late_is_still_news():
    state = running(host("a1"), host("b1"))
    for tick in range(4):
        decide(state, Tick(), 100.5 + tick / 2)
    decide(state, BeatHeard("a1", Beat(Stage.STEPPING, step=7)), 102.2)
    assert state.hosts["a1"].beat.step == 7
    assert state.hosts["a1"].answered == 102.2
