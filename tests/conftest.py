"""One Ray cluster for all tests, in a directory and on ports of its own."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

# The models are too small for a second thread, which would only wait. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Every Ray of the tests, also in child processes, is guarded by one token that no file holds.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@dataclass(frozen=True)
class RayCluster:
    temp_dir: str
    address: str
    dashboard: str


@pytest.fixture(scope="session")
def ray_cluster():
    """A head as `ray start --head` makes it, with a dashboard for jobs; this process is connected to it."""
    import ray

    port, dashboard = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="doge-ray-", dir="/tmp") as folder:  # short: Ray puts sockets below it
        command = [
            Path(sys.executable).parent / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=4",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}",
            "--disable-usage-stats", "--include-log-monitor=false",
        ]  # fmt: skip
        with open(f"{folder}/head.log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as head:
            try:
                ray.init(address=wait_for_head(head, f"127.0.0.1:{port}", log.name), log_to_driver=False)
                yield RayCluster(folder, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
                ray.shutdown()
            finally:
                for process in [*psutil.Process(head.pid).children(recursive=True), head]:
                    with suppress(psutil.NoSuchProcess):  # one may end with another
                        process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_head(head: subprocess.Popen, address: str, log: str) -> str:
    """Return the address once the head says that it is up."""
    while "Ray runtime started" not in Path(log).read_text():
        assert head.poll() is None, Path(log).read_text()
        time.sleep(0.1)
    return address
