"""Deaths that meet the coordinator at an awkward moment, which a cluster shows only now and then: the decisions are the
real ones, and time, hosts and nodes are made up. At the end, the coordinator's own process around them."""

import asyncio
from collections.abc import Callable, Coroutine
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from simulated_hosts import Simulation

from cluster.elastic import coordinator as coordinators
from cluster.elastic.coordinator import Coordinator, host_failure
from cluster.elastic.decisions.commands import (
    Abort,
    AskForAddress,
    AskForBeat,
    AskForOffer,
    AskToLeave,
    Finish,
    Flush,
    KillHost,
    LookAtNodes,
    Post,
    RunMember,
    StartHost,
    StopRun,
)
from cluster.elastic.decisions.decide import decide
from cluster.elastic.decisions.ending import ABORT_SECONDS
from cluster.elastic.decisions.forming import PAUSE_SECONDS
from cluster.elastic.decisions.known import (
    ANSWER_SECONDS,
    WATCH_SECONDS,
    Gathering,
    HostRecord,
    Known,
    Over,
    Pausing,
    Questioning,
    Running,
)
from cluster.elastic.decisions.observations import (
    AddressGiven,
    BeatHeard,
    Flushed,
    HostFailed,
    HostPrepared,
    MemberEnded,
    NodesSeen,
    Offered,
    RunStopped,
    SeatTaken,
    Tick,
)
from cluster.elastic.decisions.staffing import RETRY_SECONDS, hopeless, wanted
from cluster.elastic.decisions.watching import BUILD_SECONDS, FLUSH_SECONDS, KILL_SECONDS, grace
from cluster.elastic.events import HostLeft, Message
from cluster.elastic.membership import HostInfo, Member, Membership, Offer, Outcome, Seat
from cluster.elastic.workload import Beat, Stage
from cluster.machines.scaling import ScalingRecipe
from doge.common.errors import UserError
from doge.common.storage import StorageError

FULL_DISK = HostFailed("", "OSError", "No space left on device")
HANG = ScalingRecipe().hang_timeout_s


# -------------------------------------------------------------------- single decisions, as tables


def host(name: str, now: float = 100.0, **changes: Any) -> HostRecord:
    """A host that is ready; its node is the first letter of its name."""
    record = HostRecord(name, name[0], spare=False, started=now - 50, answered=now)
    record.info = HostInfo(hash(name) % 1000, name[0], "127.0.0.1")
    for key, value in changes.items():
        setattr(record, key, value)
    return record


def known(*hosts: HostRecord, seats: str = "ab", **scaling: Any) -> Known:
    """What is known of these hosts, with a seat on each of the nodes."""
    state = Known(ScalingRecipe(**{"num_workers": (1, 2), "warm_spares": 0} | scaling), now=100.0, ticked=99.5)
    state.seats = tuple(Seat("group", rank, len(seats), node) for rank, node in enumerate(seats))
    state.hosts = {each.name: each for each in hosts}
    state.looks = 1  # one is under way
    return state


def running(*members: HostRecord, others: tuple[HostRecord, ...] = (), seats: str = "ab", **scaling: Any) -> Known:
    """What is known while a membership of these hosts steps."""
    state = known(*members, *others, seats=seats, **scaling)
    ranks = tuple(Member(member.name, member.node, member.node) for member in members)
    membership = Membership(1, ranks, ("127.0.0.1", 1), members[0].name)
    state.number, state.holder = 1, members[0]
    state.phase = Running(membership, list(members), 0, pending=list(members), at_work=True)
    for member in members:
        member.used = member.busy = True
        member.beat = Beat(Stage.STEPPING, membership=1)
    return state


def says(commands: list, text: str) -> bool:
    return any(isinstance(c, Post) and isinstance(c.event, Message) and text in c.event.text for c in commands)


def of(kind: type, commands: list) -> list:
    return [command for command in commands if isinstance(command, kind)]


@pytest.mark.parametrize(
    ("beat", "gpus", "seconds"),
    [
        (Beat(Stage.STEPPING, waiting=True), (), KILL_SECONDS),
        (Beat(Stage.BUILDING, waiting=True), (), KILL_SECONDS),
        (Beat(Stage.STEPPING, waiting=True, step_seconds=99.0), (), KILL_SECONDS),
        (Beat(Stage.BUILDING), (), BUILD_SECONDS),
        (Beat(Stage.STEPPING), (), HANG),
        (Beat(Stage.STEPPING, step_seconds=100.0), (), 300.0),
        (Beat(Stage.STEPPING), ("0",), KILL_SECONDS),
        (Beat(Stage.STEPPING, step_seconds=10.0), ("0",), 30.0),
        (Beat(Stage.BETWEEN), ("0",), HANG),
        (Beat(Stage.JOINING), (), HANG),
        (Beat(Stage.CLOSING), (), HANG),
    ],
)
def test_how_long_a_member_may_take_to_end_a_membership_that_lost_another(beat, gpus, seconds):
    member = host("a1", beat=beat, gpus=gpus)
    assert grace(known(member), member) == seconds


@pytest.mark.parametrize(
    ("hosts", "seats", "chosen"),
    [
        ([host("a1"), host("b1")], "ab", ["a1", "b1"]),
        ([host("a1"), host("a2"), host("b1")], "ab", ["a1", "b1"]),  # a spare waits
        ([host("a1"), host("a2"), host("b1")], "aab", ["a1", "a2", "b1"]),
        ([host("a1"), host("b1", lost=True)], "ab", ["a1"]),
        ([host("a1"), host("b1", info=None)], "ab", ["a1"]),
        ([host("a1"), host("b1", answered=100 - ANSWER_SECONDS)], "ab", ["a1"]),
        ([host("a1"), host("b1", busy=True)], "ab", ["a1"]),
        ([host("a1"), host("b1", ending=99.0)], "ab", ["a1"]),
        ([host("a1"), host("c1")], "ab", ["a1"]),  # no seat is there
        ([host("a1"), host("d1")], "ad", ["a1"]),  # d is leaving
        ([host("a1", gpus=None), host("a2", gpus=())], "ab", ["a2"]),  # bound ones first
        ([host("a1", gpus=("7",))], "ab", []),  # its GPUs are no seat's
    ],
)
def test_for_every_seat_a_ready_host_that_answers_on_a_node_that_stays_is_wanted(hosts, seats, chosen):
    state = known(*deepcopy(hosts), seats=seats)
    state.leaving = frozenset("d")
    assert [each.name for each in wanted(state)] == chosen


def test_members_are_wanted_before_spares_even_if_they_are_busy_and_silent():
    members = [host("a1"), host("b1", answered=0.0)]
    state = running(*members, others=(host("b0"),))
    assert wanted(state) == members


@pytest.mark.parametrize(
    ("left_out", "hosts", "num_workers", "reason"),
    [
        ("", "", (1, 2), ""),
        ("b", "", (1, 2), ""),
        ("ab", "", (1, 2), "disk"),
        ("ab", "a", (1, 2), ""),
        ("b", "a", 2, "disk"),
        ("b", "ab", 2, ""),
    ],
)
def test_a_run_is_hopeless_where_the_nodes_that_are_there_cannot_hold_its_fewest_workers(
    left_out, hosts, num_workers, reason
):
    state = known(*(host(f"{node}1") for node in hosts), num_workers=num_workers)
    state.left_out = dict.fromkeys(left_out, "disk")
    assert hopeless(state) == reason


@pytest.mark.parametrize(
    ("beat", "stuck"),
    [
        (Beat(Stage.STEPPING, seconds=10 * HANG - 1), False),
        (Beat(Stage.STEPPING, seconds=10 * HANG + 1), True),  # its first step: nobody knows how long one takes
        (Beat(Stage.STEPPING, seconds=HANG - 1, step_seconds=1.0), False),
        (Beat(Stage.STEPPING, seconds=HANG + 1, step_seconds=1.0), True),
        (Beat(Stage.STEPPING, seconds=HANG + 1, step_seconds=10.0), False),  # within twenty steps' time
        (Beat(Stage.STEPPING, seconds=201.0, step_seconds=10.0), True),
        (Beat(Stage.STEPPING, seconds=1e6, waiting=True), False),  # another one is
        (Beat(Stage.BETWEEN, seconds=1e6), False),
        (Beat(Stage.BUILDING, seconds=1e6), False),
    ],
)
def test_a_host_that_computes_without_end_is_lost(beat, stuck):
    state = running(host("a1"), host("b1"))
    commands = decide(state, BeatHeard("b1", beat), 100.1)
    assert bool(of(KillHost, commands)) == stuck
    assert state.hosts["b1"].reason == (f"no progress in a step for {beat.seconds:.0f} seconds" if stuck else "")


def test_a_survivor_that_waited_for_a_lost_one_is_not_taken_for_stuck():
    state = running(host("a1"), host("b1"))
    decide(state, HostFailed("b1", "ActorDiedError", died=True), 100.1)
    assert not of(KillHost, decide(state, BeatHeard("a1", Beat(Stage.STEPPING, seconds=1000.0)), 100.2))


@pytest.mark.parametrize(
    ("silent_s", "ticks", "lost"), [(HANG - 1, 2, False), (HANG + 1, 1, False), (HANG + 1, 2, True)]
)
def test_a_silent_host_is_lost_unless_nobody_listened(silent_s, ticks, lost):
    """The first tick comes late, as where the coordinator's own machine was suspended: answers wait to be heard."""
    state = running(host("a1"), host("b1", asked=True))
    now = 100.0 + silent_s
    for tick in range(ticks):
        decide(state, BeatHeard("a1", Beat(Stage.STEPPING, membership=1)), now + tick / 2)
        commands = decide(state, Tick(), now + tick / 2)
    assert [command.host for command in of(KillHost, commands)] == (["b1"] if lost else [])


def test_a_question_that_a_host_leaves_open_stays_the_only_one():
    state = running(host("a1"), host("b1"))
    assert of(AskForBeat, decide(state, Tick(), 100.5)) == [AskForBeat("a1"), AskForBeat("b1")]
    decide(state, BeatHeard("a1", Beat(Stage.STEPPING)), 100.6)
    assert of(AskForBeat, decide(state, Tick(), 101.0)) == [AskForBeat("a1")]


def test_an_answer_that_comes_late_is_still_news():
    state = running(host("a1"), host("b1"))
    for tick in range(4):
        decide(state, Tick(), 100.5 + tick / 2)
    decide(state, BeatHeard("a1", Beat(Stage.STEPPING, seconds=7.0)), 102.2)
    assert state.hosts["a1"].beat.seconds == 7.0
    assert state.hosts["a1"].answered == 102.2


def test_hosts_are_asked_before_they_are_counted_on_and_the_last_rank_0_offers_the_state():
    state = known(host("a1"), host("b1"), host("c1"), seats="bc")
    state.number, state.holder = 4, state.hosts["a1"]  # its seat is gone, it still has the state
    assert of(AskForBeat, decide(state, Tick(), 100.1)) == [AskForBeat("a1"), AskForBeat("b1"), AskForBeat("c1")]
    assert isinstance(state.phase, Questioning)
    assert decide(state, BeatHeard("b1", Beat(Stage.IDLE, held=9)), 100.2) == []
    commands = decide(state, BeatHeard("c1", Beat(Stage.IDLE)), 100.2)
    assert commands == [AskForOffer("a1", copies=True)]
    assert decide(state, Offered("a1", 7), 100.3) == [AskForAddress("b1")]
    commands = decide(state, AddressGiven("b1", ("b", 1)), 100.4)
    runs = of(RunMember, commands)
    assert [(run.host, run.rank, run.given) for run in runs] == [("b1", 0, True), ("c1", 1, True)]
    assert runs[0].membership.number == 5
    assert runs[0].membership.source == "a1"
    assert state.holder is state.hosts["b1"]


def test_a_source_that_trains_on_is_rank_0_and_is_given_nothing():
    state = known(host("a1"), host("b1", beat=Beat(Stage.IDLE, held=3)))
    state.number = 4
    decide(state, Tick(), 100.1)
    for name in "a1", "b1":
        commands = decide(state, BeatHeard(name, state.hosts[name].beat), 100.2)
    assert commands == [AskForOffer("b1", copies=True)]
    decide(state, Offered("b1", 3), 100.3)
    commands = decide(state, AddressGiven("b1", ("b", 1)), 100.4)
    assert [(run.host, run.given) for run in of(RunMember, commands)] == [("b1", False), ("a1", True)]


def test_a_host_alone_offers_no_copies():
    state = known(host("a1"), seats="a")
    decide(state, Tick(), 100.1)
    assert decide(state, BeatHeard("a1", Beat(Stage.IDLE)), 100.2) == [AskForOffer("a1", copies=False)]


def test_a_host_that_dies_while_it_offers_forms_nothing():
    state = known(host("a1"), host("b1"))
    decide(state, Tick(), 100.1)
    for name in "a1", "b1":
        decide(state, BeatHeard(name, Beat(Stage.IDLE)), 100.2)
    commands = decide(state, HostFailed("a1", "ActorDiedError", died=True), 100.3)
    assert says(commands, "The workers could not meet: a worker was lost (its process died).")
    assert state.phase == Pausing(100.3 + 2 * WATCH_SECONDS)
    assert state.failures == 1


@pytest.mark.parametrize(
    ("outcomes", "over", "failures", "says_so"),
    [
        ({"a1": Outcome("finished", 9), "b1": Outcome("finished", 9)}, True, 3, ""),
        ({"a1": Outcome("finished", 9), "b1": None}, True, 3, ""),
        ({"a1": None, "b1": Outcome("finished", 9)}, False, 0, "Step 10 was interrupted: a worker was lost (its proce"),
        ({"a1": Outcome("stopped", 9), "b1": Outcome("broken", 9, "closed")}, True, 3, ""),
        ({"a1": Outcome("left", 9), "b1": Outcome("left", 9)}, False, 3, ""),
        ({"a1": Outcome("broken", 5, "closed"), "b1": None}, False, 4, "Step 6 was interrupted: a worker was lost ("),
        ({"a1": Outcome("broken", 6, "closed"), "b1": None}, False, 0, "Step 7 was interrupted: a worker was lost ("),
        ({"a1": Outcome("broken", 5, "closed"), "b1": Outcome("broken", 5, "other")}, False, 4, "interrupted: closed."),
        ({"a1": Outcome("broken", 5, "closed"), "b1": Outcome("full", 5, "no memory")}, False, 4, ": no memory."),
        ({"a1": Outcome("left", 5), "b1": Outcome("broken", 5, "closed")}, False, 4, "interrupted: closed."),
    ],
)
def test_what_follows_from_the_end_of_a_membership(outcomes, over, failures, says_so):
    """An outcome of None stands for a member that was lost."""
    state = running(host("a1"), host("b1"))
    state.failures, state.reached = 3, 5
    commands = []
    for name, outcome in outcomes.items():
        said = MemberEnded(name, outcome) if outcome else HostFailed(name, "ActorDiedError", died=True)
        commands += decide(state, said, 100.1)
    assert isinstance(state.phase, Over) == over == bool(of(Finish, commands))
    assert state.failures == failures
    assert says(commands, says_so) if says_so else not says(commands, "")
    assert not of(StopRun, commands)
    assert state.reached == (5 if over else max(5, *(o.step for o in outcomes.values() if o)))


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
    assert commands[-1] == Finish()
    assert decide(state, Tick(), 101.0) == []


def test_members_of_a_broken_membership_are_told_after_a_second_and_once():
    state = running(host("a1"), host("b1"))
    decide(state, HostFailed("b1", "ActorDiedError", died=True), 100.0)
    assert not of(Abort, decide(state, Tick(), 100.0 + ABORT_SECONDS))
    assert of(Abort, decide(state, Tick(), 100.1 + ABORT_SECONDS)) == [Abort("a1", 1)]
    assert not of(Abort, decide(state, Tick(), 100.6 + ABORT_SECONDS))


def test_members_leave_once_where_enough_others_should_train():
    state = running(host("a1"), host("b1"), others=(host("c1"),), num_workers=2)
    for rank, node in enumerate("az"):  # a host for the seat on z has yet to start
        assert not of(AskToLeave, decide(state, SeatTaken(Seat("new", rank, 2, node)), 100.1))
    for rank, node in enumerate("ac"):
        commands = decide(state, SeatTaken(Seat("newer", rank, 2, node)), 100.2)
    assert of(AskToLeave, commands) == [AskToLeave("a1"), AskToLeave("b1")]
    assert not of(AskToLeave, decide(state, Tick(), 100.5))


def test_hosts_of_a_node_that_will_go_leave_and_none_starts_there():
    state = running(host("a1"), host("b1"), warm_spares=1)
    commands = decide(state, NodesSeen(100.0, draining=frozenset("bz")), 100.1)
    assert of(AskToLeave, commands) == [AskToLeave("a1"), AskToLeave("b1")]
    assert says(commands, "1 node will go soon; the workers there leave first.")
    assert {start.node for start in of(StartHost, commands)} == {"a"}  # the spare


def test_spares_start_only_where_the_hosts_of_all_seats_are_at_work():
    state = running(host("a1"), host("b1"), seats="abb", warm_spares=1)
    assert [start.node for start in of(StartHost, decide(state, Tick(), 100.1))] == ["a", "b"]
    assert [each.spare for each in state.hosts.values()][2:] == [True, False]
    state = running(host("a1"), host("b1"), warm_spares=1)
    state.phase.at_work, state.hosts["b1"].beat = False, Beat(Stage.BUILDING, membership=1)
    assert not of(StartHost, decide(state, BeatHeard("a1", Beat(Stage.STEPPING, membership=1)), 100.2))
    assert not of(StartHost, decide(state, Tick(), 100.3))
    assert of(StartHost, decide(state, BeatHeard("b1", Beat(Stage.BETWEEN, membership=1)), 100.4))


def test_hosts_without_a_seat_end_once_the_members_have_the_state_and_theirs_is_written():
    state = running(host("a1"), host("b1"), others=(host("c1", used=True),))
    state.phase.at_work = False
    assert of(Flush, decide(state, BeatHeard("a1", Beat(Stage.STEPPING, membership=1)), 100.1)) == [Flush("c1")]
    commands = decide(state, Flushed("c1"), 105.0)
    assert commands[:2] == [Post(HostLeft("c1", 105.0)), KillHost("c1", "c", None)]
    assert state.to_replace == 0
    assert "c1" not in state.hosts


def test_a_host_that_cannot_write_what_it_has_is_ended_all_the_same():
    state = running(host("a1"), host("b1"), others=(host("c1", ending=100.0, answered=100.0),))
    assert not of(KillHost, decide(state, Tick(), 100.0 + HANG))
    for name in "a1", "b1", "c1":
        decide(state, BeatHeard(name, Beat(Stage.STEPPING, membership=1)), 100.0 + FLUSH_SECONDS)
    commands = decide(state, Tick(), 100.5 + FLUSH_SECONDS)
    assert of(KillHost, commands) == [KillHost("c1", "c", None)]


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
    assert decide(state, RunStopped(), 100.1) == [Finish()]


def test_a_run_that_somebody_else_stops_lets_its_members_end_it():
    state = running(host("a1"), host("b1"))
    assert decide(state, RunStopped(), 100.1) == []
    decide(state, MemberEnded("a1", Outcome("stopped", 3)), 100.2)
    assert decide(state, MemberEnded("b1", Outcome("stopped", 3)), 100.2) == [Finish()]


@pytest.mark.parametrize("error", ["OSError", "StorageError"])
def test_a_node_is_left_out_when_too_many_starts_failed_and_looking_at_it_brought_no_news(error):
    state = known(host("a1", info=None), max_failures=2)
    state.looks, now = 0, 100.0
    for attempt in range(1, 4):
        (start,) = of(StartHost, decide(state, Tick(), now))
        failed = HostFailed(start.host, error, "No space left on device")
        commands = decide(state, failed, now + 0.1)
        assert of(LookAtNodes, commands) == [LookAtNodes(now + 0.1)]
        assert not says(decide(state, NodesSeen(now), now + 0.2), "No worker")  # asked before it failed
        commands = decide(state, NodesSeen(now + 0.1), now + 0.2)
        text = f"No worker can start on node b, which is left out: {error}: No space left on device."
        assert says(commands, text) == (attempt == 3)
        decide(state, BeatHeard("a1", Beat(Stage.IDLE)), now + 0.2)
        assert not of(StartHost, decide(state, Tick(), now + WATCH_SECONDS * attempt))
        now += 0.11 + WATCH_SECONDS * attempt
    assert not of(StartHost, decide(state, Tick(), now))


def test_pauses_between_attempts_to_form_grow_to_half_a_minute():
    state, pauses = known(host("a1"), seats="a", max_failures=-1), []
    now = 100.0
    for _ in range(9):
        decide(state, BeatHeard("a1", Beat(Stage.IDLE)), now)
        decide(state, BeatHeard("a1", Beat(Stage.IDLE)), now)
        decide(state, Offered("a1", trouble="No."), now)
        decide(state, AddressGiven("a1", ("a", 1)), now)
        pauses.append(state.phase.until - now)
        now = state.phase.until
        decide(state, Tick(), now)
    assert pauses == [1, 2, 4, 8, 16, *[PAUSE_SECONDS] * 4]


def test_what_a_lost_host_says_is_ignored():
    state = running(host("a1"), host("b1"))
    decide(state, HostFailed("b1", "ActorDiedError", died=True), 100.1)
    for late in (
        MemberEnded("b1", Outcome("finished", 9)),
        HostFailed("b1", "ActorDiedError", died=True),
        HostPrepared("c9", HostInfo(1, "c", "")),
    ):
        assert decide(state, late, 100.2) == []


# -------------------------------------------------------------------- whole stories, in made-up time


@pytest.fixture
def simulation() -> Simulation:
    return Simulation()


def test_a_lost_member_is_replaced_by_the_spare_within_a_second(simulation):
    simulation.until(simulation.formed(1))
    survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
    spare = simulation.spare("b")
    simulation.kill(victim)
    assert simulation.until(simulation.formed(2)) < 1
    assert {simulation.at("a", 2), simulation.at("b", 2)} == {survivor, spare}
    first, second = simulation.formations()
    assert (first.lost_s, first.world_size, second.world_size) == (None, 2, 2)
    assert 0 < second.lost_s < 1
    simulation.finish()
    assert simulation.reason is None
    joined = [name for kind, name in simulation.comings_and_goings() if kind == "HostJoined"]
    assert joined == [survivor.name, victim.name, spare.name]
    assert ("HostLeft", victim.name) in simulation.comings_and_goings()


def test_a_node_that_comes_and_one_that_is_to_go_break_nothing(simulation):
    simulation.until(simulation.formed(1))
    simulation.sit("abc")
    simulation.until(simulation.formed(2))
    assert simulation.nodes(2) == set("abc")
    first = simulation.memberships[2].members[0]
    simulation.draining.add(first.node)
    simulation.until(simulation.formed(3))
    assert simulation.memberships[3].source == first.host  # it offers what it has before it goes
    assert first.host not in {member.host for member in simulation.memberships[3].members}
    simulation.until(lambda: simulation.hosts[first.host].killed)
    assert not any("interrupted" in message for message in simulation.messages())
    simulation.finish()


def test_the_neighbours_of_a_lost_host_must_answer_before_they_are_counted_on(simulation):
    simulation.until(simulation.formed(1))
    survivor, victim, neighbour = simulation.at("a", 1), simulation.at("b", 1), simulation.spare("b")
    neighbour.silent = True
    simulation.kill(victim)
    simulation.until(simulation.formed(2))
    assert [member.host for member in simulation.memberships[2].members] == [survivor.name]


@pytest.mark.parametrize("waiting", [False, True])
def test_a_survivor_that_computes_may_end_its_micro_batch_and_one_that_waits_for_ever_is_replaced(simulation, waiting):
    simulation.until(simulation.formed(1))
    survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
    simulation.spare("a")
    simulation.spare("b")
    simulation.run(2)
    survivor.waiting, survivor.notices, survivor.heeds = waiting, False, False
    simulation.run(1)
    simulation.kill(victim)
    if waiting:
        assert KILL_SECONDS < simulation.until(lambda: survivor.killed) < KILL_SECONDS + 2 * WATCH_SECONDS
        kills = [command for _, command in simulation.done if isinstance(command, KillHost)]
        assert KillHost(survivor.name, "a", survivor.pid) in kills  # by a signal, for it may be stopped
    else:
        simulation.run(5 * KILL_SECONDS)
        assert not survivor.killed
        simulation.end(survivor, Outcome("broken", 0, "The step was abandoned."))
    simulation.until(simulation.formed(2))
    assert (simulation.at("a", 2) is survivor) != waiting


def test_no_host_starts_on_a_dead_node_and_one_that_just_did_ends_nothing(simulation):
    simulation.until(simulation.formed(1))
    survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
    simulation.spare("a")
    simulation.kill(simulation.spare("b"))
    simulation.dying.add("b")
    simulation.kill(victim)
    simulation.until(simulation.formed(2))
    simulation.until(lambda: "b" in simulation.known.dead)
    assert simulation.nodes(2) == {"a"}
    started = len(simulation.hosts)
    simulation.run(30)
    assert len(simulation.hosts) == started
    survivor.seconds = 1000.0  # without a step: the watch still looks at hosts
    simulation.until(lambda: survivor.killed)
    simulation.until(simulation.formed(3))
    assert simulation.nodes(3) == {"a"}
    assert not [message for message in simulation.messages() if message.startswith("No ")]


def test_where_a_node_has_no_memory_for_a_spare_its_worker_is_replaced_all_the_same():
    simulation = Simulation(max_failures=1)
    simulation.room["b"] = 1
    simulation.until(simulation.formed(1))
    sentence = "No spare can start on node b for now: MemoryError: too little memory."
    simulation.until(lambda: sentence in simulation.messages())
    simulation.kill(simulation.at("b", 1))
    numbers = simulation.memberships
    simulation.until(lambda: any(number > 1 and simulation.nodes(number) == set("ab") for number in numbers))
    starts = len(simulation.hosts)
    simulation.run(RETRY_SECONDS - 60)
    assert len(simulation.hosts) == starts
    simulation.run(120)
    assert len(simulation.hosts) == starts + 1
    assert simulation.messages().count(sentence) == 1


def test_the_first_hosts_and_spares_replace_nobody_and_later_ones_do(simulation):
    simulation.until(simulation.formed(1))
    simulation.spare("a")
    simulation.spare("b")
    assert list(simulation.starts().values()) == [False] * 4
    simulation.kill(simulation.at("b", 1))
    simulation.until(lambda: len(simulation.starts()) == 5)
    assert list(simulation.starts().values()) == [False] * 4 + [True]
    assert set(list(simulation.starts())[:4]) <= simulation.started()


def test_what_starts_on_a_new_node_after_a_loss_was_made_good_replaces_nobody(simulation):
    simulation.until(simulation.formed(1))
    simulation.spare("a")
    simulation.spare("b")
    simulation.kill(simulation.at("b", 1))
    simulation.until(lambda: len(simulation.starts()) == 5)
    simulation.until(simulation.formed(2))
    simulation.sit("abc")
    simulation.until(lambda: len(simulation.starts()) == 6)
    assert list(simulation.starts().values()) == [False] * 4 + [True, False]


def test_a_run_is_not_over_when_rank_0_dies_over_the_last_checkpoint(simulation):
    simulation.until(simulation.formed(1))
    simulation.spare("a")
    simulation.spare("b")
    rank_0, other = (simulation.hosts[member.host] for member in simulation.memberships[1].members)
    simulation.end(other, Outcome("finished", 1))
    simulation.run(1)
    assert not simulation.finished
    simulation.kill(rank_0)
    simulation.until(simulation.formed(2))
    simulation.finish()
    assert simulation.reason is None


def test_an_answer_that_a_slow_host_gives_between_two_looks_counts(simulation):
    simulation.until(simulation.formed(1))
    slow = simulation.at("a", 1)
    slow.delay, slow.seconds = 1.5 * WATCH_SECONDS, 7.0
    simulation.until(lambda: simulation.record(slow).beat.seconds == 7.0, 2)


def test_a_node_on_which_nothing_starts_is_left_out_and_the_others_train():
    simulation = Simulation("", max_failures=2)
    simulation.start_errors["b"] = FULL_DISK
    simulation.sit("ab")
    simulation.until(simulation.messages)
    reason = "OSError: No space left on device"
    assert simulation.messages() == [f"No worker can start on node b, which is left out: {reason}."]
    simulation.until(simulation.formed(1))
    simulation.spare("a")
    assert sum(each.node == "b" for each in simulation.hosts.values()) == 3
    simulation.finish()
    assert simulation.nodes(1) == {"a"}
    assert simulation.reason is None


def test_where_nothing_starts_anywhere_the_run_says_why():
    simulation = Simulation("", max_failures=0)
    simulation.start_errors = {"a": FULL_DISK, "b": FULL_DISK}
    simulation.sit("ab")
    simulation.until(lambda: simulation.finished)
    reason = "No process for the workers could be started: OSError: No space left on device."
    assert simulation.reason == reason


def test_an_attempt_to_start_hosts_fails_once_however_many_seats_a_node_has():
    simulation = Simulation("", max_failures=2)
    simulation.start_errors["b"] = FULL_DISK
    simulation.sit("abbb")
    simulation.until(simulation.messages)
    assert sum(each.node == "b" for each in simulation.hosts.values()) == 3 * 3
    simulation.until(simulation.formed(1))


def test_where_seats_change_a_node_that_was_left_out_gets_another_chance():
    simulation = Simulation("", max_failures=0)
    simulation.start_errors["b"] = FULL_DISK
    simulation.sit("ab")
    simulation.until(simulation.messages)
    simulation.start_errors.clear()
    simulation.sit("abc")
    simulation.until(lambda: any(simulation.nodes(number) == set("abc") for number in simulation.memberships))


def test_survivors_do_not_wait_for_ever_for_a_node_on_which_nothing_starts():
    simulation = Simulation(max_failures=1, num_workers=2)
    simulation.until(simulation.formed(1))
    simulation.spare("a")  # no seat is there for it
    simulation.start_errors["b"] = FULL_DISK
    simulation.kill(simulation.spare("b"))
    simulation.kill(simulation.at("b", 1))
    simulation.until(lambda: simulation.finished)
    reason = "No process for the workers could be started: OSError: No space left on device."
    assert simulation.reason == reason


@pytest.mark.parametrize("passes", [False, True])
def test_a_storage_that_cannot_tell_the_newest_state_is_asked_again_and_ends_no_host(passes):
    simulation = Simulation(max_failures=3)
    simulation.storage_trouble = "The storage does not answer."

    def told() -> list[str]:
        return [message for message in simulation.messages() if message.startswith("The workers could not meet")]

    if passes:
        simulation.until(lambda: len(told()) == 2)
        simulation.storage_trouble = ""
        simulation.until(simulation.formed(1))
        simulation.spare("a")
        simulation.spare("b")
        assert not any(each.killed for each in simulation.hosts.values())
        simulation.finish()
    simulation.until(lambda: simulation.finished)
    assert told() == ["The workers could not meet: The storage does not answer."] * (2 if passes else 4)
    assert len(simulation.hosts) == (4 if passes else 2)
    assert (simulation.reason is None) == passes
    assert passes or "failed 4 times" in simulation.reason


def test_a_host_that_was_silent_and_then_hangs_is_replaced(simulation):
    simulation.until(simulation.formed(1))
    survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
    simulation.spare("a")
    simulation.spare("b")
    survivor.waiting, survivor.notices, survivor.heeds = True, False, False
    simulation.run(1)
    survivor.silent = True
    simulation.run(2 * ANSWER_SECONDS)
    simulation.kill(victim)
    simulation.until(simulation.formed(2))
    assert survivor.aborted == [1]  # it reads that when it wakes
    assert not survivor.killed
    simulation.run(KILL_SECONDS * 2)
    assert not survivor.killed
    simulation.wake(survivor)
    simulation.until(lambda: survivor.killed, KILL_SECONDS + 1)
    assert survivor.name not in {member.host for member in simulation.memberships[2].members}


def test_a_host_that_was_silent_and_finds_its_membership_gone_trains_again(simulation):
    simulation.until(simulation.formed(1))
    sleeper, victim = simulation.at("a", 1), simulation.at("b", 1)
    simulation.spare("b")
    sleeper.silent = True
    simulation.run(2 * ANSWER_SECONDS)
    simulation.kill(victim)
    simulation.until(simulation.formed(2))
    assert simulation.record(sleeper).busy
    simulation.wake(sleeper)
    simulation.run(5)
    assert not sleeper.killed
    assert not simulation.record(sleeper).busy


@pytest.mark.parametrize("stage", [Stage.BUILDING, Stage.BETWEEN, Stage.CLOSING])
def test_a_survivor_with_something_else_to_do_is_not_replaced_for_it(simulation, stage):
    simulation.until(simulation.formed(1))
    survivor, victim = simulation.at("a", 1), simulation.at("b", 1)
    simulation.spare("b")
    survivor.stage, survivor.notices, survivor.heeds = stage, False, False
    simulation.run(1)
    simulation.kill(victim)
    simulation.run(3 * KILL_SECONDS)
    assert survivor.aborted == [1]
    assert not survivor.killed
    simulation.end(survivor, Outcome("broken", 0, "The membership was abandoned."))
    simulation.until(simulation.formed(2))
    assert simulation.at("a", 2) is survivor


# -------------------------------------------------------------------- the process around the decisions


class Method:
    """Stands for an actor's method."""

    def __init__(self, call: Callable[..., Coroutine]):
        self._call = call

    def remote(self, *arguments) -> asyncio.Future:
        return asyncio.ensure_future(self._call(*arguments))


class Actor:
    """Stands for a handle: every coroutine of the subclass is called by ``.remote``."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return Method(value) if asyncio.iscoroutinefunction(value) else value


class Board(Actor):
    def __init__(self):
        self.posts, self.reason = [], None

    async def post(self, event: Any) -> None:
        self.posts.append(event)

    async def stop(self, reason: str) -> None:
        self.reason = self.reason or reason

    async def stopped(self) -> str | None:
        return self.reason


class Host(Actor):
    """One that finishes its first membership, or dies in it where ``dies``."""

    def __init__(self, name: str, dies: bool):
        self.name, self.dies, self.killed, self.given = name, dies, False, []

    async def prepare(self, job: Any) -> HostInfo:
        await asyncio.sleep(0.01)
        return HostInfo(1, self.name[0], "127.0.0.1")

    async def status(self) -> Beat:
        return Beat(Stage.IDLE)

    async def offer(self, copies: bool) -> Offer:
        return Offer(5, ("a reference",) if copies else ())

    async def address(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    async def leave(self) -> None:
        pass

    async def run(self, membership: Membership, rank: int, state: Any) -> Outcome:
        self.given.append(state)
        if self.dies:
            raise ray.exceptions.RayActorError
        return Outcome("broken" if membership.number == 1 else "finished", 6)


@pytest.fixture
def hosts(monkeypatch) -> list[Host]:
    started: list[Host] = []

    def start(name: str, node: str) -> Host:
        started.append(Host(name, dies=name == "b-2"))
        return started[-1]

    monkeypatch.setattr(coordinators, "start_host", start)
    monkeypatch.setattr(coordinators, "kill_host", lambda handle, *_: setattr(handle, "killed", True))
    monkeypatch.setattr(coordinators, "draining_and_dead_nodes", lambda: (set(), set()))
    monkeypatch.setattr(coordinators, "WATCH_SECONDS", 0.02)
    return started


def conduct(board: Board) -> Coordinator:
    async def story() -> Coordinator:
        coordinator = Coordinator("simulated", SimpleNamespace(board=board), ScalingRecipe(num_workers=2))
        for rank, node in enumerate("ab"):
            await coordinator.sit(Seat("group", rank, 2, node))
        await coordinator.conduct()
        await coordinator.over()
        return coordinator

    return asyncio.run(asyncio.wait_for(story(), 20))


def test_a_run_whose_first_membership_loses_a_host_is_conducted_to_its_end(hosts):
    board = Board()
    conduct(board)
    assert board.reason is None
    assert [type(event).__name__ for event in board.posts].count("MembershipFormed") == 2
    assert [each.given for each in hosts[:3]] == [[None, None], ["a reference"], ["a reference"]]
    assert all(each.killed for each in hosts)


def test_a_look_at_the_nodes_that_fails_ends_the_run_with_its_reason(hosts, monkeypatch):
    def fail() -> None:
        raise ConnectionError("the head is gone")

    monkeypatch.setattr(coordinators, "draining_and_dead_nodes", fail)
    board = Board()
    with pytest.raises(ConnectionError):
        conduct(board)
    assert board.reason == "The coordinator of the run failed: ConnectionError('the head is gone')."
    assert hosts
    assert all(each.killed for each in hosts)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ray.exceptions.RayActorError(), {"died": True}),
        (ray.exceptions.RayTaskError("prepare", "", OSError("No  space\nleft")), {"sentence": "No space left"}),
        (ray.exceptions.RayTaskError("prepare", "", UserError("No coffee.")), {"user_error": True}),
        (ray.exceptions.RayTaskError("prepare", "", StorageError("No answer.")), {"user_error": False}),
        (ray.exceptions.ActorUnschedulableError("The node is gone."), {"died": False}),
    ],
)
def test_what_a_failed_call_says_of_its_host(error, said):
    failure = host_failure("a1", error)
    assert {name: getattr(failure, name) for name in said} == said
