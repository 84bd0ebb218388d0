"""Chaos from end to end, against a run whose coordinator is a small actor and whose workers do nothing."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import ray
from nodes import add_node, wait_until
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.chaos import Chaos, Nobody, RunOver
from cluster.elastic.coordinator import NAMESPACE, actor_name
from doge.common.errors import UserError

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors cannot import this file


class Host:
    """Has the process title of a real one."""

    def pid(self) -> int:
        return os.getpid()


class FakeCoordinator:
    """Knows its hosts, and forgets the dead ones."""

    def __init__(self, nodes: list[str]):
        self.hosts = []
        for place, node in enumerate(nodes):
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            handle = ray.remote(num_cpus=0)(Host).options(scheduling_strategy=there).remote()
            self.hosts.append((f"host-{place}", node, ray.get(handle.pid.remote()), handle))

    def members(self) -> list[dict]:
        there = [host for host in self.hosts if alive(host[2])]
        return [
            {
                "host": host, "node": node, "pid": pid, "rank": rank if rank < 2 else None, "membership": 1, "step": 57,
                "phase": "step",
            }
            for rank, (host, node, pid, _) in enumerate(there)
        ]  # fmt: skip


@dataclass
class FakeRun:
    name: str
    coordinator: Any
    pids: list[int]


@contextmanager
def a_run(*nodes: str):
    """Two workers and a spare on the head, or one on each of ``nodes``."""
    head, name = ray.get_runtime_context().get_node_id(), f"fake-{secrets.token_hex(3)}"
    here = NodeAffinitySchedulingStrategy(head, soft=False)
    how = {"name": actor_name(name), "namespace": NAMESPACE, "scheduling_strategy": here, "num_cpus": 0}
    coordinator = ray.remote(FakeCoordinator).options(**how).remote(list(nodes) or [head] * 3)
    try:
        yield FakeRun(name, coordinator, [row["pid"] for row in ray.get(coordinator.members.remote(), timeout=60)])
    finally:
        ray.kill(coordinator)


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def command(*arguments: str):
    """The command, under way; it hears Ctrl-C even where the tests run in a shell's background, which ignores it."""
    with subprocess.Popen(
        [sys.executable, "-m", "cluster.chaos", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def wait_for_line(process: subprocess.Popen, words: str) -> str:
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(process.stderr.read())


def test_the_command_does_what_it_prints(ray_cluster):
    with a_run() as run:
        rank_0, rank_1, spare = run.pids
        events = ["--at", "0", "kill-rank-0", "0.5", "kill-node", "1.5", "throttle", "--throttle-seconds", "0.5"]
        with command("--address", ray_cluster.address, "--seed", "7", *events) as process:
            out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        seed, found, killed, skipped, throttled = out.splitlines()
        assert seed == "Seed 7"
        assert found == f"Disturbing the run {run.name}"
        assert "kill-rank-0" in killed
        assert f"host host-0 (rank 0, pid {rank_0})" in killed
        assert "at step 57" in killed
        assert not alive(rank_0)
        assert "kill-node" in skipped
        assert "skipped: All workers are on the head node" in skipped
        assert "33% of its time for 0.5 s" in throttled
        assert alive(rank_1)
        assert alive(spare)
        assert not is_stopped(rank_1)


def test_an_ended_command_leaves_nothing_stopped(ray_cluster):
    with a_run() as run:
        pause = ["--run", run.name, "--address", ray_cluster.address, "--at", "0", "pause", "--pause-seconds", "100"]
        for end in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with command(*pause) as process:
                wait_for_line(process, "pause")
                assert sum(map(is_stopped, run.pids)) == 1
                process.send_signal(end)
                status = process.wait(60)
                assert status == 130 or end != signal.SIGINT
                seconds = wait_until(lambda: not any(map(is_stopped, run.pids)), 30, "the worker to go on")
                print(f"{end.name}: the worker went on {seconds:.2f} s after the command had ended")


def test_a_node_with_workers_is_killed_and_no_other(ray_cluster):
    head = ray.get_runtime_context().get_node_id()
    node = add_node(ray_cluster.address)
    try:
        with a_run(head, node.node_id) as run, Chaos(run.name) as chaos:
            with pytest.raises(UserError, match="is the head node, which must live on: choose another"):
                chaos.kill_node(head)
            done = chaos.kill_node()
            assert [victim.host for victim in done.victims] == ["host-1"]
            wait_until(lambda: not alive(run.pids[1]), 10, "the worker to die")
            wait_until(lambda: node.process.poll() is not None, 30, "the node to die")
            assert alive(run.pids[0])
            assert [member.rank for member in chaos.members()] == [0]
            with pytest.raises(UserError, match="All workers are on the head node"):
                chaos.kill_node()
    finally:
        node.kill()


def test_a_test_can_disturb_a_run(ray_cluster):
    with a_run() as run:
        with Chaos() as chaos:
            assert chaos.run == run.name
            assert [member.rank for member in chaos.members()] == [0, 1, None]
            paused = chaos.pause(rank=1, seconds=2)
            wait_until(lambda: is_stopped(run.pids[1]), 10, "the worker to be stopped")
            assert str(paused).split() == (
                f"pause node {paused.node} host host-1 (rank 1, pid {run.pids[1]}) at step 57 for 2 s".split()
            )
            wait_until(lambda: not is_stopped(run.pids[1]), 10, "the worker to go on")
            chaos.throttle(rank=0, share=0.1, seconds=100)
            wait_until(lambda: is_stopped(run.pids[0]), 10, "the worker to be stopped")
            chaos.pause(rank=0, seconds=100)  # in place of the throttle
            chaos.release()
            wait_until(lambda: not is_stopped(run.pids[0]), 10, "the worker to go on")
            chaos.throttle(rank=0, share=0.1, seconds=100)
            assert chaos.kill_worker(rank=0).victims[0].pid == run.pids[0]
            wait_until(lambda: not alive(run.pids[0]), 10, "the worker to die")
            with pytest.raises(Nobody, match="as rank 5"):
                chaos.kill_worker(rank=5)
            with Chaos(run.name, seed=3, spares=True) as other:
                hosts = {other.pause(seconds=0.01).victims[0].rank for _ in range(10)}
            assert hosts == {0, 1} or None in hosts
            chaos.pause(seconds=100)
        assert not any(is_stopped(pid) for pid in run.pids if alive(pid))


def test_a_process_that_is_no_worker_is_left_alone(ray_cluster):
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as bystander:
        with a_run() as run, Chaos(run.name) as chaos:
            chaos.members = lambda members=chaos.members: [
                member.__class__(**{**vars(member), "pid": bystander.pid}) for member in members()
            ]
            for disturb in (chaos.kill_worker, chaos.pause, chaos.throttle):
                with pytest.raises(Nobody, match="is gone"):
                    disturb()
            assert bystander.poll() is None
            assert not is_stopped(bystander.pid)
        bystander.kill()


def test_which_run_is_meant_must_be_clear(ray_cluster):
    # Ray forgets an actor that was killed a moment later.
    wait_until(lambda: "No run is under way in the cluster" in refusal(Chaos), 30, "the runs of other tests to end")
    with a_run() as first, a_run() as second:
        both = " and ".join(sorted([first.name, second.name]))
        with pytest.raises(UserError, match=f"The runs {both} are under way"):
            Chaos()
        with pytest.raises(UserError, match=f"No run none is under way in the cluster; there is {both}"):
            Chaos("none")
        chaos = Chaos(first.name)
    wait_until(lambda: refusal(chaos.members) == f"The run {first.name} is over.", 30, "the end to be noticed")
    with pytest.raises(RunOver):
        chaos.kill_worker()
    chaos.close()


def refusal(act: Callable[[], object]) -> str:
    """The sentence that an attempt is refused with, empty if it is not."""
    try:
        result = act()
    except UserError as error:
        return str(error)
    if isinstance(result, Chaos):
        result.close()
    return ""


def test_the_command_ends_with_the_run(ray_cluster):
    with a_run() as run, command("--run", run.name, "--address", ray_cluster.address, "--every", "1e6") as process:
        wait_for_line(process, "Disturbing")
        ray.kill(run.coordinator)
        assert wait_for_line(process, "is over") == f"The run {run.name} is over.\n"
        assert process.wait(30) == 0
