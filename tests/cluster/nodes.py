"""More nodes for the tests' Ray cluster: each a raylet of its own on this machine, that can be drained or killed."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 60


@dataclass(frozen=True)
class Node:
    node_id: str
    address: str
    process: subprocess.Popen

    def kill(self) -> None:
        """SIGKILL the raylet and every process of it, as when the machine loses its power."""
        with suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()

    def drain(self, deadline_s: float) -> None:
        """Announce that the node will be taken away in ``deadline_s`` seconds, as `ray drain-node` does."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

        deadline_ms = int((time.time() + deadline_s) * 1000)
        reason = "a test takes the node away"
        accepted, refusal = GcsClient(address=self.address).drain_node(
            self.node_id, DRAIN_NODE_REASON_PREEMPTION, reason, deadline_ms
        )
        assert accepted, refusal


def add_node(address: str, resources: dict[str, float] | None = None, num_cpus: float = 1) -> Node:
    """Start a node of the cluster at ``address`` and wait until the cluster knows it."""
    mark = f"mark-{secrets.token_hex(4)}"  # finds the node among those that start at the same time
    command = [
        Path(sys.executable).parent / "ray", "start", "--block", f"--address={address}", f"--num-cpus={num_cpus:g}",
        f"--resources={json.dumps((resources or {}) | {mark: 1})}", "--object-store-memory=100000000",
        "--disable-usage-stats", "--include-log-monitor=false",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"RAY_ADDRESS": ""}
    )
    node = Node("", address, process)
    try:
        wait_until(lambda: process.poll() is not None or _find(mark), START_SECONDS, "the node to start")
        assert process.poll() is None, f"ray start ended with {process.poll()}"
    except BaseException:
        node.kill()
        raise
    return Node(_find(mark), address, process)


def _find(mark: str) -> str | None:
    import ray

    return next((node["NodeID"] for node in ray.nodes() if node["Alive"] and mark in node["Resources"]), None)


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> float:
    """Wait for ``condition`` to hold and return the seconds that it took. Raises AssertionError after ``timeout_s``."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)
    return time.monotonic() - start
