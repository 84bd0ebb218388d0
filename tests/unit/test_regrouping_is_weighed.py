"""A membership is ended for other hosts when that pays: arrivals are taken in together, and not too often."""

from simulated_hosts import Simulation

from cluster.elastic.decisions.commands import Flush
from cluster.elastic.decisions.ending import ARRIVE_SECONDS, WORTH
from cluster.elastic.decisions.forming import HICCUP_SECONDS
from cluster.elastic.decisions.known import Running
from cluster.elastic.decisions.observations import RunInterrupted
from cluster.elastic.decisions.watching import SILENT_SECONDS
from cluster.elastic.membership import StateId


def simulation(nodes: str, workers: int = 64, **settings) -> Simulation:
    made = Simulation(nodes, num_workers=(1, workers), warm_spares=0, **settings)
    made.until(made.formed(1))
    made.run(5)
    return made


def test_six_nodes_that_arrive_together_make_one_membership():
    run = simulation("ab")
    run.slow_starts = {node: 10.0 + 5 * at for at, node in enumerate("cdefgh")}
    run.sit("abcdefgh")
    run.until(run.formed(2))
    assert run.nodes(2) == set("abcdefgh")
    run.run(100)
    assert len(run.memberships) == 2


def test_a_host_whose_start_hangs_keeps_the_others_waiting_for_a_while_only():
    run = simulation("ab")
    run.slow_starts = {"d": 1e9}
    run.sit("abcd")
    seconds = run.until(run.formed(2))
    assert run.nodes(2) == set("abc")
    assert ARRIVE_SECONDS - 5 < seconds < ARRIVE_SECONDS + 5


def test_a_stream_of_arrivals_leaves_the_members_time_to_step():
    run = simulation("ab")
    phase = run.known.phase
    assert isinstance(phase, Running)
    phase.formed_at = run.now
    for host in run.members():
        host.enter_s = 4.0
    run.run(1)
    run.sit("abc")
    assert WORTH * 4.0 - 2 < run.until(run.formed(2)) < WORTH * 4.0 + 2


def test_a_host_that_has_to_go_is_let_go_at_once():
    run = simulation("abc")
    for host in run.members():
        host.enter_s = 100.0
    run.run(1)
    run.draining.add("c")
    assert run.until(run.formed(2)) < 3
    assert run.nodes(2) == {"a", "b"}


def test_after_a_hiccup_the_few_that_answer_first_do_not_go_on_alone():
    run = simulation("abcdefgh")
    hosts = run.members()
    for host in hosts[2:]:
        host.silent = True
    run.kill(hosts[1])
    run.run(8)
    assert len(run.memberships) == 1
    for host in hosts[2:]:
        run.wake(host)
    run.until(run.formed(2))
    assert len(run.nodes(2)) >= 4


def test_spares_that_went_silent_with_their_node_are_no_hiccup():
    run = Simulation("ab", num_workers=(1, 2), warm_spares=1)
    run.until(run.formed(1))
    run.spare("a")
    run.spare("b")
    for host in run.hosts.values():
        if host.node == "b":
            host.silent = True
    survivor = run.at("a", 1)
    survivor.waiting, survivor.moves = True, False
    assert run.until(run.formed(2)) < SILENT_SECONDS + 4
    assert run.nodes(2) == {"a"}


def test_those_that_never_answer_are_not_waited_for_without_an_end():
    run = simulation("abcd")
    hosts = run.members()
    for host in hosts[2:]:
        host.silent = True
    run.kill(hosts[1])
    assert run.until(run.formed(2)) < HICCUP_SECONDS + 10
    assert run.nodes(2) == {"a", "b"}  # the killed one has a successor


def test_an_interrupted_run_leaves_at_a_step_writes_what_it_has_and_ends():
    run = simulation("ab")
    for host in run.members():
        host.step, host.held = 7, StateId(7, 1)
    run.observe(RunInterrupted())
    assert run.until(lambda: run.finished) < 3
    assert len([command for _, command in run.done if isinstance(command, Flush)]) == 2
    assert len(run.memberships) == 1
    assert run.reason is None
    assert all(host.killed for host in run.hosts.values())


def test_a_run_that_is_interrupted_before_its_first_step_ends_at_once():
    run = Simulation("ab", warm_spares=0, start_s=50.0)
    run.run(3)
    run.observe(RunInterrupted())
    assert run.until(lambda: run.finished) < 3
