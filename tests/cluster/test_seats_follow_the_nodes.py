"""The seats of a run on a cluster whose nodes come, drain and die."""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import ray
from nodes import Node, add_node, wait_until
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.elastic.seat_trainer import SeatTrainer
from cluster.machines.nodes import possible_workers
from cluster.machines.scaling import SeatRequest
from doge.common.errors import UserError

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the seats cannot import this file
SEAT = {"CPU": 1, "seat": 1}  # the head has none of the second


class Hall:
    """Who sits where, as the latest group of seats says."""

    def __init__(self):
        self.seats, self.size, self.over = [], 0, False

    def sit(self, size: int, node: str) -> None:
        if len(self.seats) == self.size:  # the group before was complete
            self.seats, self.size = [], size
        self.seats.append(node)

    def nodes(self) -> list[str]:
        """Of the latest group's seats, once it is complete."""
        return sorted(self.seats) if len(self.seats) == self.size else []

    def close(self) -> None:
        self.over = True

    def is_over(self) -> bool:
        return self.over


def sit(config: dict) -> None:
    assert "torch" not in sys.modules
    hall = config["hall"]
    ray.get(hall.sit.remote(ray.train.get_context().get_world_size(), ray.get_runtime_context().get_node_id()))
    while not ray.get(hall.is_over.remote()):
        time.sleep(0.2)


def refuse(config: dict) -> None:
    raise UserError("There is no coffee: bring some.")


def trainer(function: Callable, path, hall=None, resources=SEAT, **seats) -> SeatTrainer:
    return SeatTrainer(function, {"hall": hall}, SeatRequest(resources, **seats), f"seats-{time.time_ns()}", str(path))


@contextmanager
def running(path, **seats):
    """Seats that are held in the background until the block ends."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    hall = ray.remote(Hall).options(num_cpus=0, scheduling_strategy=here).remote()  # nobody kills this node
    run = threading.Thread(target=trainer(sit, path, hall, **seats).fit, daemon=True)
    run.start()
    try:
        yield hall
    finally:
        ray.get(hall.close.remote())
        run.join(60)
    assert not run.is_alive()


def wait_for_seats(hall, nodes: list[Node], within_s: float) -> float:
    expected = sorted(node.node_id for node in nodes)
    return wait_until(lambda: ray.get(hall.nodes.remote()) == expected, within_s, "the seats")


@pytest.fixture
def node(ray_cluster):
    started = []

    def start() -> Node:
        started.append(add_node(ray_cluster.address, {"seat": 1}))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def test_seats_appear_on_a_node_that_arrives_and_outlive_its_death(node, tmp_path):
    first = node()
    with running(tmp_path, max_workers=2) as hall:
        print(f"\nfirst seat after {wait_for_seats(hall, [first], 60):.1f} s")
        second = node()
        print(f"seats on a node that arrived after {wait_for_seats(hall, [first, second], 40):.1f} s")
        second.kill()
        seconds = wait_for_seats(hall, [first], 40)
        print(f"seats without a node that was killed after {seconds:.1f} s")
        known = next(n["Alive"] for n in ray.nodes() if n["NodeID"] == second.node_id)
        assert known or seconds > 10, "the seats should not wait for Ray to declare the node dead"


def test_the_seats_of_a_draining_node_move(node, tmp_path):
    first, second = node(), node()
    with running(tmp_path, max_workers=1) as hall:
        wait_until(lambda: len(ray.get(hall.nodes.remote())) == 1, 60, "the seat")
        leaving, staying = (first, second) if ray.get(hall.nodes.remote()) == [first.node_id] else (second, first)
        leaving.drain(300)
        print(f"\nseat moved off a draining node after {wait_for_seats(hall, [staying], 40):.1f} s")
        assert possible_workers(SeatRequest(SEAT)) == 1


def test_a_run_without_room_for_its_fewest_workers_says_so(ray_cluster, tmp_path):
    with pytest.raises(UserError, match=r"2 workers with 1 CPU and 1 seat each found no room for 1 s: the cluster has"):
        trainer(sit, tmp_path, min_workers=2, wait_timeout_s=1).fit()


def test_a_sentence_that_a_seat_raises_ends_the_run(ray_cluster, tmp_path):
    with pytest.raises(UserError, match=r"^There is no coffee: bring some\.$"):
        trainer(refuse, tmp_path, resources={"CPU": 1}).fit()
