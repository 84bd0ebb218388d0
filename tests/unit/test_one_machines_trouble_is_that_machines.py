"""Promise 8: a host that fails is recycled, then left out and named; only what every host would meet ends a run."""

import pytest
from simulated_hosts import Simulation

from cluster.elastic.decisions.ending import BARRED_SECONDS, RECYCLES
from cluster.elastic.membership import Outcome, StateId


def breaks(simulation: Simulation, nodes: str, kind: str = "failed", reason: str = "CUDA error: sticky") -> None:
    """In the newest membership these nodes' hosts fail by themselves, and the others notice."""
    number = max(simulation.memberships)
    hosts = [simulation.hosts[member.host] for member in simulation.memberships[number].members]
    for host in hosts:
        own = host.node in nodes
        outcome = Outcome(kind, host.step, reason) if own else Outcome("broken", host.step, "Connection closed by peer")
        simulation.end(host, outcome)


def next_membership(simulation: Simulation, within_s: float = 120.0) -> set[str]:
    number = max(simulation.memberships, default=0) + 1
    simulation.until(simulation.formed(number), within_s)
    return simulation.nodes(number)


def two(simulation: Simulation, within_s: float = 60.0) -> None:
    """Let time pass until a membership of both nodes steps."""
    simulation.until(lambda: len({host.node for host in simulation.members()}) == 2, within_s)


def test_a_host_that_fails_is_recycled_then_left_out_and_named_and_tried_again_later():
    simulation = Simulation(warm_spares=0)
    victims = []
    for _ in range(RECYCLES + 1):
        two(simulation)
        victims.append(simulation.at("b", max(simulation.memberships)))
        breaks(simulation, "b")
        simulation.run(0.5)
    assert len({victim.name for victim in victims}) == RECYCLES + 1
    assert all(victim.killed for victim in victims)
    (message,) = [message for message in simulation.messages() if "left out" in message]
    assert "b" in message
    assert "10:00" in message
    assert "CUDA error: sticky" in message
    simulation.until(lambda: [host.node for host in simulation.members()] == ["a"])
    survivor = simulation.members()[0]
    simulation.run(BARRED_SECONDS - 60)
    assert {host.node for host in simulation.members()} == {"a"}
    two(simulation, 120)
    assert not survivor.killed
    assert simulation.reason is None


def test_a_machine_that_cannot_work_keeps_its_process():
    """Its storage does not answer: another process would do no better, and this one holds the newest state."""
    simulation = Simulation(warm_spares=0)
    two(simulation)
    host = simulation.at("b", max(simulation.memberships))
    breaks(simulation, "b", "unable", "The storage cannot be reached.")
    two(simulation)
    assert simulation.at("b", max(simulation.memberships)) is host
    assert not host.killed
    assert "The storage cannot be reached" in simulation.messages()[-1]


@pytest.mark.parametrize("kind", ["failed", "unable"])
def test_what_befalls_all_leaves_nobody_out_and_ends_the_run_with_its_cause(kind):
    simulation = Simulation(warm_spares=0, max_failures=4)
    while not simulation.finished:
        two(simulation)
        breaks(simulation, "ab", kind, "TypeError: of every host")
        simulation.run(1)
    assert "TypeError: of every host" in simulation.reason
    assert not [message for message in simulation.messages() if "left out" in message]


def test_the_cause_is_told_and_not_what_the_others_noticed_of_it():
    simulation = Simulation(warm_spares=0, max_failures=0)
    two(simulation)
    breaks(simulation, "b")
    simulation.until(lambda: simulation.finished)
    assert "CUDA error: sticky" in simulation.reason
    assert "Connection closed" not in simulation.reason


def test_nobody_is_left_out_who_is_needed():
    simulation = Simulation(warm_spares=0, num_workers=2, max_failures=5)
    while not simulation.finished:
        two(simulation)
        breaks(simulation, "b")
        simulation.run(1)
    assert not [message for message in simulation.messages() if "left out" in message]
    assert "6 times" in simulation.reason


def test_failures_with_new_steps_between_them_leave_nobody_out():
    simulation = Simulation(warm_spares=0)
    for step in range(1, 3 * RECYCLES):
        two(simulation)
        for host in simulation.members():
            host.step, host.held = step, StateId(step, max(simulation.memberships))
        simulation.run(1)
        breaks(simulation, "b")
        simulation.run(0.5)
    assert not [message for message in simulation.messages() if "left out" in message]
    assert simulation.reason is None


def test_a_machine_whose_processes_die_in_every_membership_is_left_out_too():
    simulation = Simulation(warm_spares=0)
    for _ in range(RECYCLES + 1):
        two(simulation)
        simulation.kill(simulation.at("b", max(simulation.memberships)))
        simulation.run(0.5)
    assert [message for message in simulation.messages() if "left out" in message]
    simulation.run(60)
    assert {host.node for host in simulation.members()} == {"a"}


def test_who_is_left_out_must_do_when_all_others_are_gone():
    simulation = Simulation(warm_spares=0, wait_timeout_s=0)
    for _ in range(RECYCLES + 1):
        two(simulation)
        breaks(simulation, "b")
        simulation.run(0.5)
    simulation.until(lambda: [host.node for host in simulation.members()] == ["a"])
    simulation.dead.add("a")
    simulation.dying.add("a")
    simulation.kill(simulation.members()[0])
    simulation.sit("b")
    assert next_membership(simulation) == {"b"}
