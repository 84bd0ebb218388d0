"""Single decisions of the coordinator, as tables: what it knows, what it observes, what it commands."""

from copy import deepcopy
from dataclasses import replace

import pytest
from known_hosts import answers, host, known, of, passing, running, says

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
from cluster.elastic.decisions.ending import ABORT_SECONDS, PAUSE_SECONDS
from cluster.elastic.decisions.known import (
    ANSWER_SECONDS,
    WATCH_SECONDS,
    Over,
    Pausing,
    Questioning,
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
    SeatTaken,
    Tick,
)
from cluster.elastic.decisions.staffing import bind_gpus, hopeless, wanted
from cluster.elastic.decisions.watching import (
    FLUSH_SECONDS,
)
from cluster.elastic.events import HostLeft
from cluster.elastic.membership import HostInfo, Outcome, Seat, StateId
from cluster.elastic.workload import Beat, Stage


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


def test_hosts_are_asked_before_they_are_counted_on_and_one_without_a_seat_may_offer_the_state():
    state = known(host("a1", beat=Beat(held=StateId(9, 4))), host("b1"), host("c1"), seats="bc")
    state.number, state.holder = 4, state.hosts["a1"]  # its seat is gone, it still has the state
    assert of(AskForBeat, decide(state, Tick(), 100.1)) == [AskForBeat("a1"), AskForBeat("b1"), AskForBeat("c1")]
    assert isinstance(state.phase, Questioning)
    assert decide(state, BeatHeard("b1", Beat(Stage.IDLE, held=StateId(7, 4))), 100.2) == []
    commands = decide(state, BeatHeard("c1", Beat(Stage.IDLE)), 100.2)
    assert commands == [AskForOffer("a1", copy="always")]
    assert decide(state, Offered("a1", StateId(9, 4), copied=True), 100.3) == [AskForAddress("b1")]
    commands = decide(state, AddressGiven("b1", ("b", 1)), 100.4)
    runs = of(RunMember, commands)
    assert [(run.host, run.rank, run.given) for run in runs] == [("b1", 0, True), ("c1", 1, True)]
    assert runs[0].membership.number == 5
    assert runs[0].membership.start == StateId(9, 4)
    assert state.holder is state.hosts["b1"]


def test_a_source_that_trains_on_is_rank_0_and_is_given_nothing():
    state = known(host("a1"), host("b1"))
    state.number = 4
    decide(state, Tick(), 100.1)
    assert answers(state, None, StateId(3, 4)) == [AskForOffer("b1", copy="always")]
    decide(state, Offered("b1", StateId(3, 4), copied=True), 100.3)
    commands = decide(state, AddressGiven("b1", ("b", 1)), 100.4)
    assert [(run.host, run.given) for run in of(RunMember, commands)] == [("b1", False), ("a1", True)]


@pytest.mark.parametrize(
    ("held", "source", "given"),
    [
        ((StateId(7, 2), StateId(7, 2), StateId(7, 2)), "b1", []),  # survivors: nobody needs a copy
        ((StateId(8, 2), StateId(8, 2), StateId(7, 2)), "b1", ["c1"]),  # one had not made the last step
        ((StateId(7, 2), StateId(7, 1), StateId(7, 2)), "a1", ["b1"]),  # the same step, but of another membership
        ((StateId(7, 2), None, StateId(7, 2)), "a1", ["b1"]),  # a spare
        ((StateId(8, 2), StateId(7, 2), StateId(7, 2)), "a1", ["b1", "c1"]),  # before the last rank 0
        ((None, None, None), "b1", []),  # a fresh start
    ],
)
def test_who_has_the_newest_state_offers_it_and_only_those_are_given_it_that_hold_another(held, source, given):
    state = known(host("a1"), host("b1"), host("c1"), seats="abc", num_workers=(1, 3))
    state.number, state.holder = 2, state.hosts["b1"]
    decide(state, Tick(), 100.1)
    copy = "always" if given or held[0] is None else "if new"
    assert answers(state, *held) == [AskForOffer(source, copy=copy)]
    newest = max((each for each in held if each is not None), default=None)
    decide(state, Offered(source, newest, copied=bool(given)), 100.3)
    runs = of(RunMember, decide(state, AddressGiven(source, ("b", 1)), 100.4))
    assert runs[0].host == source
    assert [run.host for run in runs if run.given] == given
    assert {run.membership.start for run in runs} == {newest}


def test_a_state_that_is_newer_than_was_told_is_asked_for_again_with_copies():
    state = known(host("a1"), host("b1"))
    decide(state, Tick(), 100.1)
    assert answers(state, StateId(7, 2), StateId(7, 2)) == [AskForOffer("a1", copy="if new")]
    assert decide(state, Offered("a1", StateId(8, 2)), 100.3) == [AskForAddress("a1")]
    assert decide(state, AddressGiven("a1", ("a", 1)), 100.4) == [AskForOffer("a1", copy="always")]
    commands = decide(state, Offered("a1", StateId(8, 2), copied=True), 100.5)
    assert [(run.host, run.given) for run in of(RunMember, commands)] == [("a1", False), ("b1", True)]


def test_a_seat_that_comes_back_with_another_gpu_gets_a_host_and_the_old_one_hands_on_its_state():
    state = known(host("a1", gpus=("0",), beat=Beat(Stage.IDLE, held=StateId(7, 1))), seats="a")
    state.seats = (Seat("group", 0, 1, "a", ("1",)),)
    state.number = 1
    (start,) = of(StartHost, decide(state, Tick(), 100.1))
    assert start.node == "a"
    decide(state, HostPrepared(start.host, HostInfo(9, "a", "")), 101.0)
    commands = decide(state, BeatHeard(start.host, Beat(Stage.IDLE)), 101.1)
    assert of(AskForOffer, commands) == [AskForOffer("a1", copy="always")]
    decide(state, Offered("a1", StateId(7, 1), copied=True), 101.2)
    (run,) = of(RunMember, decide(state, AddressGiven(start.host, ("a", 1)), 101.3))
    assert run.membership.members[0].gpus == ("1",)
    beat = Beat(Stage.STEPPING, membership=2)
    assert of(Flush, decide(state, BeatHeard(start.host, beat), 101.6)) == [Flush("a1")]


def test_who_gets_a_gpu_is_told_which_process_had_it_before():
    state = running(host("a1", gpus=None), host("a2", gpus=None), seats="aa", num_workers=2)
    state.seats = tuple(Seat("group", rank, 2, "a", (gpu,)) for rank, gpu in enumerate("01"))
    bind_gpus(state, state.members)
    assert [each.predecessor for each in state.members] == [None, None]
    state.hosts["a3"] = host("a3", gpus=None)
    bind_gpus(state, [state.hosts["a1"], state.hosts["a3"]])
    info = state.hosts["a2"].info
    assert (state.hosts["a3"].gpus, state.hosts["a3"].predecessor) == (("1",), (info.pid, info.started))
    bind_gpus(state, [state.hosts["a1"], state.hosts["a3"]])
    assert state.hosts["a1"].predecessor is None
    for rank, gpu in enumerate("12"):
        decide(state, SeatTaken(Seat("other", rank, 2, "a", (gpu,))), 100.1)
    assert list(state.tenants) == [("a", ("1",))]


def test_a_host_alone_offers_no_copies():
    state = known(host("a1"), seats="a")
    decide(state, Tick(), 100.1)
    assert decide(state, BeatHeard("a1", Beat(Stage.IDLE)), 100.2) == [AskForOffer("a1", copy="never")]


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
        ({"a1": Outcome("stopped", 9), "b1": Outcome("broken", 9, "closed")}, False, 3, ""),
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


def test_where_no_member_can_tell_its_outcome_the_steps_that_they_told_before_count():
    state = running(host("a1"), host("b1"))
    state.failures, state.reached = 3, 5
    decide(state, BeatHeard("a1", Beat(Stage.STEPPING, membership=state.number, step=8)), 100.0)
    decide(state, HostFailed("a1", "ActorDiedError", died=True), 100.1)
    commands = decide(state, HostFailed("b1", "ActorDiedError", died=True), 100.1)
    assert says(commands, "Step 9 was interrupted: a worker was lost (its process died).")
    assert (state.reached, state.failures) == (8, 0)


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
    assert of(AskToLeave, commands) == [AskToLeave("a1", 1), AskToLeave("b1", 1)]
    assert not of(AskToLeave, decide(state, Tick(), 100.5))


def test_hosts_of_a_node_that_will_go_leave_and_none_starts_there():
    state = running(host("a1"), host("b1"), warm_spares=1)
    commands = decide(state, NodesSeen(100.0, draining=frozenset("bz")), 100.1)
    assert of(AskToLeave, commands) == [AskToLeave("a1", 1), AskToLeave("b1", 1)]
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
    beats = {name: Beat(Stage.STEPPING, membership=1, waiting=True) for name in ("a1", "b1")} | {"c1": Beat(Stage.IDLE)}
    beats["a1"] = replace(beats["a1"], waiting=False)
    assert not of(KillHost, passing(state, 100.0 + FLUSH_SECONDS, beats))
    commands = passing(state, 101.0 + FLUSH_SECONDS, beats)
    assert of(KillHost, commands) == [KillHost("c1", "c", None)]


def test_a_silent_host_whose_gpu_another_one_gets_is_ended():
    silent = host("a1", gpus=("0",), used=True, busy=True, given_up=99.0, answered=90.0)
    state = known(silent, host("a2", gpus=None), seats="a")
    state.seats = (Seat("group", 0, 1, "a", ("0",)),)
    state.number = 1
    decide(state, Tick(), 100.1)
    decide(state, BeatHeard("a2", Beat(Stage.IDLE)), 100.2)
    decide(state, Offered("a2"), 100.2)
    commands = decide(state, AddressGiven("a2", ("a", 1)), 100.3)
    assert of(RunMember, commands)[0].membership.members[0].gpus == ("0",)
    assert [kill.host for kill in of(KillHost, commands)] == ["a1"]


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
        state.hosts["a1"].answered = now
        decide(state, Tick(), now)
        decide(state, BeatHeard("a1", Beat(Stage.IDLE)), now)
        decide(state, Offered("a1", trouble="No."), now)
        decide(state, AddressGiven("a1", ("a", 1)), now)
        pauses.append(state.phase.until - now)
        now = state.phase.until
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
