"""Deaths that meet the coordinator at an awkward moment, which a cluster shows only now and then: the decisions are the
real ones, and time, hosts and nodes are made up."""

import pytest
from simulated_hosts import Simulation

from cluster.elastic.decisions.commands import AskForOffer, KillHost
from cluster.elastic.decisions.known import ANSWER_SECONDS, WATCH_SECONDS
from cluster.elastic.decisions.observations import HostFailed
from cluster.elastic.decisions.staffing import RETRY_SECONDS
from cluster.elastic.decisions.watching import KILL_SECONDS
from cluster.elastic.membership import Outcome
from cluster.elastic.workload import Stage

FULL_DISK = HostFailed("", "OSError", "No space left on device")


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
    asked = [command.host for _, command in simulation.done if isinstance(command, AskForOffer)]
    assert asked[-1] == first.host  # it offers what it has before it goes
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
        assert KillHost(survivor.name, "a", (survivor.pid, None)) in kills  # by a signal, for it may be stopped
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
    survivor.moves = False  # the watch still looks at hosts
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
    slow.delay, slow.step_s = 1.5 * WATCH_SECONDS, 7.0
    simulation.until(lambda: simulation.record(slow).beat.step_seconds == 7.0, 2)


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
