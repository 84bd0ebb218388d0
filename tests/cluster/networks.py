"""Machines with a network link each: Ray nodes in network namespaces, which see no directory of the driver's."""

import os
import secrets
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

RAY = Path(sys.executable).parent / "ray"


def why_not() -> str:
    """Why there can be no such machines here; empty if there can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    name = f"doge{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"no network namespace can be made: {made.stderr.strip()}" if made.returncode else ""


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


class Network:
    """A bridge, the head of a cluster at its address, and machines behind it; leaving the block ends all of it.

    Args:
        folder: for logs and Ray's files.
        hidden: directory that only the head's machine sees.
    """

    def __init__(self, folder: Path, hidden: Path):
        self.folder, self.hidden = folder, hidden
        self.mark = secrets.token_hex(2)
        self.bridge = f"doge{self.mark}"
        self.prefix = f"10.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}"
        self.address = f"{self.prefix}.1:{20_000 + secrets.randbelow(10_000)}"
        self._processes: list[subprocess.Popen] = []
        self._spaces: list[str] = []

    def __enter__(self) -> "Network":
        try:
            _run("ip", "link", "add", self.bridge, "type", "bridge")
            _run("ip", "addr", "add", f"{self.prefix}.1/24", "dev", self.bridge)
            _run("ip", "link", "set", self.bridge, "up")
            host, port = self.address.split(":")
            self._start(
                "head", RAY, "start", "--head", "--block", f"--node-ip-address={host}", f"--port={port}",
                "--num-cpus=4", "--include-dashboard=false", f"--temp-dir={self.folder}/ray", "--disable-usage-stats",
                "--include-log-monitor=false", "--object-store-memory=200000000",
            )  # fmt: skip
            self._wait_for("head", "Ray runtime started")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                for each in family:
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
            process.wait()
        for space in self._spaces:
            for pid in subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)

    def add_machine(self, letter: str, number: int) -> None:
        """Start a machine whose Ray node is started again whenever it ends, as a service would; wait until it is up."""
        space, outer = f"doge{self.mark}{letter}", self._link(letter)
        self._spaces.append(space)
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "link", "set", outer, "master", self.bridge)
        _run("ip", "link", "set", outer, "up")
        inside = ("ip", "-n", space)
        _run(*inside, "addr", "add", f"{self.prefix}.{number}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        _run(*inside, "link", "set", "lo", "up")
        start = (
            f"mount -t tmpfs none {self.hidden}; while true; do {RAY} start --block --address={self.address} "
            f'--node-ip-address={self.prefix}.{number} --num-cpus=1 --resources=\'{{"seat": 1, "{letter}": 1}}\' '
            "--disable-usage-stats --include-log-monitor=false --object-store-memory=100000000; sleep 1; done"
        )
        self._start(letter, "ip", "netns", "exec", space, "unshare", "-m", "sh", "-c", start)
        self._wait_for(letter, "Ray runtime started")

    def cut(self, letter: str) -> None:
        """Cut a machine's link: nothing comes through, and nobody is told."""
        _run("ip", "link", "set", self._link(letter), "down")

    def heal(self, letter: str) -> None:
        _run("ip", "link", "set", self._link(letter), "up")

    def environment(self) -> dict[str, str]:
        return {**os.environ, "RAY_ADDRESS": self.address}

    def _link(self, letter: str) -> str:
        return f"dg{self.mark}{letter}"

    def _start(self, name: str, *command: object) -> None:
        environment = {**os.environ, "RAY_ADDRESS": "", "DOGE_CACHE": str(self.folder / f"cache-{name}")}
        with open(self.folder / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._processes.append(process)

    def _wait_for(self, name: str, text: str, timeout_s: float = 150.0) -> None:
        log, deadline = self.folder / f"{name}.log", time.monotonic() + timeout_s
        while text not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
