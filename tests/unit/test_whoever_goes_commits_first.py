"""Notices, interruptions and a run's end, as tables: the newest state is committed, and in time."""

from dataclasses import replace

import pytest
from known_hosts import answers, host, known, of, running, says

from cluster.elastic.decisions.commands import (
    Abort,
    AskForOffer,
    AskToLeave,
    Commit,
    Finish,
    Flush,
    KillHost,
    RunMember,
    StopRun,
)
from cluster.elastic.decisions.decide import decide
from cluster.elastic.decisions.known import (
    Gathering,
    Known,
    Pausing,
)
from cluster.elastic.decisions.observations import (
    AddressGiven,
    BeatHeard,
    Flushed,
    HostFailed,
    MemberEnded,
    NodesSeen,
    Offered,
    RunInterrupted,
    RunStopped,
    Tick,
)
from cluster.elastic.membership import Outcome, StateId
from cluster.elastic.workload import Beat, Stage


def test_too_many_failures_in_a_row_end_the_run():
    state = running(host("a1"), host("b1"), max_failures=2)
    state.failures = 2
    decide(state, MemberEnded("b1", Outcome("broken", 0, "closed.")), 100.1)
    commands = decide(state, MemberEnded("a1", Outcome("broken", 0, "closed.")), 100.2)
    reason = (
        "The workers failed 3 times without making a new step (closed): run the same command to resume from the last "
        "checkpoint."
    )
    assert of(StopRun, commands) == [StopRun(reason)]
    assert of(Commit, commands) == [Commit("a1")]
    assert winds_up(state)
    assert decide(state, Tick(), 101.0) == []


def winds_up(state: Known) -> bool:
    """Whether the run is over as soon as all hosts have written what they have, and not before."""
    *first, last = list(state.hosts)
    early = [command for name in first for command in decide(state, Flushed(name), 100.3)]
    return not of(Finish, early) and of(Finish, decide(state, Flushed(last), 100.4)) == [Finish()]


@pytest.mark.parametrize(
    ("failed", "stops"),
    [
        (HostFailed("b1", "UserError", "There is no coffee.", user_error=True), True),
        (HostFailed("b1", "StorageError", "The storage does not answer."), False),
        (HostFailed("b1", "ActorDiedError", died=True), False),
    ],
)
def test_what_every_host_would_fail_with_ends_the_run_and_what_may_pass_does_not(failed, stops):
    state = known(host("a1"), host("b1"))
    commands = decide(state, failed, 100.1)
    assert of(StopRun, commands) == ([StopRun("There is no coffee.")] if stops else [])
    assert bool(of(Finish, commands)) == stops
    assert of(KillHost, commands)


@pytest.mark.parametrize("phase", [Gathering(), Pausing(1e9)])
def test_a_run_that_somebody_else_stops_is_over_at_once_where_nobody_trains(phase):
    state = known(host("a1"))
    state.phase = phase
    assert decide(state, RunStopped(), 100.1) == [KillHost("a1", "a", None), Finish()]


def test_a_run_that_somebody_else_stops_lets_its_members_end_it():
    state = running(host("a1"), host("b1"))
    assert decide(state, RunStopped(), 100.1) == []
    decide(state, MemberEnded("a1", Outcome("stopped", 3)), 100.2)
    commands = decide(state, MemberEnded("b1", Outcome("stopped", 3)), 100.2)
    assert commands == [Commit("a1"), Flush("a1"), Flush("b1")]
    assert winds_up(state)


def test_the_newest_state_is_committed_wherever_a_run_ends_and_nobody_trains():
    held = {"a1": StateId(4, 1), "b1": StateId(5, 1)}
    hosts = [host(name, used=True, beat=Beat(Stage.IDLE, held=each)) for name, each in held.items()]
    state = known(*hosts, seats="abc")
    state.phase = Pausing(1e9)
    commands = decide(state, RunInterrupted(), 100.1)
    assert commands == [Flush("a1"), Commit("b1"), Flush("b1")]
    assert winds_up(state)


@pytest.mark.parametrize(
    ("step_s", "beat", "hurried"),
    [
        (1.0, {}, False),  # the next step is soon made
        (79.0, {}, True),
        (0.0, {}, True),  # of a first step nobody knows how long it takes
        (79.0, {"held": None}, False),  # the state is partitioned, or an update is half made
        (79.0, {"held": StateId(2, 1)}, False),
        (79.0, {"stage": Stage.BETWEEN}, True),  # an evaluation is made later
        (79.0, {"stage": Stage.BUILDING}, False),
        (79.0, {"stage": Stage.BETWEEN, "activity": "commit"}, False),  # it would be written no more
    ],
)
@pytest.mark.parametrize("why", ["drain", "interruption"])
def test_who_has_to_go_waits_for_no_long_step(step_s, beat, hurried, why):
    state = running(host("a1"), host("b1"), num_workers=(2, 2))  # fewer than the fewest would remain
    for member in state.members:
        usual = Beat(Stage.STEPPING, membership=1, step=3, step_seconds=step_s, held=StateId(3, 1))
        member.beat = replace(usual, **beat)
    notice = NodesSeen(100.0, draining=frozenset("b")) if why == "drain" else RunInterrupted()
    commands = decide(state, notice, 100.1)
    assert of(Abort, commands) == ([Abort("a1", 1), Abort("b1", 1)] if hurried else [])
    assert of(AskToLeave, commands) == ([] if hurried else [AskToLeave("a1", 1), AskToLeave("b1", 1)])
    again = decide(state, Tick(), 100.2)
    assert not of(Abort, again) + of(AskToLeave, again)
    if hurried:
        decide(state, MemberEnded("a1", Outcome("broken", 3, "abandoned")), 100.3)
        commands = decide(state, Tick(), 100.3)
        assert of(Commit, commands) == [Commit("a1")]  # the other one may be stuck
        commands = decide(state, MemberEnded("b1", Outcome("broken", 3, "abandoned")), 100.4)
        assert says(commands, "Step 4 was given up: workers have to go before it would be made.")
        assert state.failures == 0


def test_members_that_wait_for_the_end_of_a_step_are_hurried_once_their_state_is_whole():
    state = running(host("a1"), host("b1"))
    for member in state.members:
        member.beat = Beat(Stage.STEPPING, membership=1, step=3, step_seconds=79.0)  # an update is half made
    assert of(AskToLeave, decide(state, RunInterrupted(), 100.1))
    for member in state.members:
        commands = decide(state, BeatHeard(member.name, replace(member.beat, held=StateId(3, 1))), 100.2)
    assert of(Abort, [*commands, *decide(state, Tick(), 100.3)]) == [Abort("a1", 1), Abort("b1", 1)]


def test_a_membership_that_breaks_on_a_node_that_goes_leaves_its_state_committed():
    state = running(host("a1"), host("b1"), num_workers=(2, 2))
    for member in state.members:
        member.beat = Beat(Stage.STEPPING, membership=1, step=3, step_seconds=1.0, held=StateId(3, 1))
    assert of(AskToLeave, decide(state, NodesSeen(100.0, draining=frozenset("ab")), 100.1))
    decide(state, HostFailed("b1", "ActorDiedError", died=True), 100.2)
    commands = decide(state, MemberEnded("a1", Outcome("broken", 3, "closed")), 100.3)
    assert of(Commit, commands) == [Commit("a1")]


@pytest.mark.parametrize("end", [RunInterrupted(), RunStopped()])
def test_a_run_that_ends_while_a_membership_forms_begins_none(end):
    state = known(*(host(name, used=True, beat=Beat(Stage.IDLE, held=StateId(3, 1))) for name in ("a1", "b1")))
    state.number = 1
    decide(state, Tick(), 100.1)
    assert of(AskForOffer, answers(state, StateId(3, 1), StateId(3, 1)))
    commands = decide(state, end, 100.3)
    assert of(Flush, commands) == [Flush("a1"), Flush("b1")]
    decide(state, Offered("a1", StateId(3, 1)), 100.4)
    assert not of(RunMember, decide(state, AddressGiven("a1", ("a", 1)), 100.5))


def test_members_that_no_step_lets_leave_are_hurried_after_ten_seconds():
    """They wait for data that nobody prepares, for example."""
    state = running(host("a1"), host("b1"))
    for member in state.members:
        member.beat = Beat(Stage.BETWEEN, membership=1, step=3, step_seconds=1.0, held=StateId(3, 1))
    assert not of(Abort, decide(state, RunInterrupted(), 100.1))
    for member in state.members:
        decide(state, BeatHeard(member.name, member.beat), 109.5)
    assert not of(Abort, decide(state, Tick(), 110.0))
    assert of(Abort, decide(state, Tick(), 110.2)) == [Abort("a1", 1), Abort("b1", 1)]


def test_a_notice_while_nobody_trains_commits_the_newest_state():
    held = Beat(Stage.IDLE, held=StateId(5, 1))
    state = known(host("a1", used=True, beat=held), num_workers=(2, 2))
    assert of(Commit, decide(state, NodesSeen(100.0, draining=frozenset("a")), 100.1)) == [Commit("a1")]
    assert not of(Commit, decide(state, NodesSeen(100.0, draining=frozenset("a")), 100.6))
