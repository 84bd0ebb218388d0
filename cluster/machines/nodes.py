"""The cluster's nodes as they are now: which are there, which are going, and how many seats they have room for.

This file builds on private interfaces of Ray: checked with Ray 2.60.
"""

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray

from cluster.machines.scaling import SeatRequest
from doge.common.words import count

PROBE_SECONDS = 1.0


@dataclass(frozen=True)
class View:
    """The cluster's nodes at one moment.

    Args:
        free: resources of every node that takes new work, by node id.
        unusable: ids of the nodes that drain, or that are gone though Ray does not know it yet.
        silent: ids of the nodes that did not answer in time; they take no new work, but may come back.
    """

    free: dict[str, dict[str, float]]
    unusable: set[str]
    silent: set[str]

    def room(self, request: SeatRequest, held: dict[str, int]) -> int:
        """Seats that there can be, where ``held`` counts those that a node has already."""
        each = [_fitting(request.resources, free) + held.get(node, 0) for node, free in self.free.items()]
        number = sum(min(seats, 1) if request.one_per_node else seats for seats in each)
        return min([number, *(bound for bound in (request.max_workers, request.most) if bound is not None)])


def look(busy: bool = True) -> View:
    """Ask Ray for the nodes and their free resources, and every node's raylet whether it is there.

    Args:
        busy: what others use is not free; False counts all that the nodes have.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    free = ray._private.state.available_resources_per_node() if busy else {n: d["Resources"] for n, d in nodes.items()}
    with ThreadPoolExecutor(min(len(nodes), 32) or 1) as pool:
        answers = dict(zip(nodes, pool.map(_answers, nodes.values()), strict=True))
    silent = {node for node, answer in answers.items() if answer is None}
    unusable = {node for node, answer in answers.items() if answer is False}
    unusable |= nodes.keys() & _draining_nodes()
    usable = nodes.keys() - silent - unusable
    return View({node: free.get(node, {}) for node in usable}, unusable, silent)


def possible_workers(request: SeatRequest) -> int:
    """Workers that there can be on the nodes that are alive and stay, if nobody else uses them."""
    return look(busy=False).room(request, {})


def describe_cluster() -> str:
    """What the cluster has, for a message: "the cluster has 2 nodes, 4 CPUs, 0 GPUs"."""
    view = look(busy=False)
    cpus, gpus = (sum(free.get(name, 0) for free in view.free.values()) for name in ("CPU", "GPU"))
    nodes = f"the cluster has {count(len(view.free), 'node')}, {count(cpus, 'CPU')}, {count(gpus, 'GPU')}"
    leaving = len(view.unusable | view.silent)
    return nodes + (f", and {count(leaving, 'node')} on the way out" if leaving else "")


def draining_and_dead_nodes() -> tuple[set[str], set[str]]:
    """Ray's ids of the nodes that will go soon and of those that are gone; one that dies meanwhile is in either."""
    return _draining_nodes(), {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def node_of_actor(handle: Any) -> str:
    """Ray's id of the node on which an actor runs."""
    node: str = ray._private.state.state.actor_table(handle._actor_id.hex())["Address"]["NodeID"]
    return node


def _draining_nodes() -> set[str]:
    return set(ray._private.state.state.get_draining_nodes())


def _fitting(resources: dict[str, float], free: dict[str, float]) -> int:
    return min(int(free.get(name, 0) / amount + 1e-6) for name, amount in resources.items() if amount > 0)


def _answers(node: dict[str, Any]) -> bool | None:
    """Whether the node's raylet takes a connection; None if nothing came back in time.

    Ray notices a raylet that was killed after 13-15 s with its default settings, a refused connection at once.
    """
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), PROBE_SECONDS).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return None
    return True
