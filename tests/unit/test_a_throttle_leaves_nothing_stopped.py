"""A throttled process gets the share that it should, and runs freely again whoever dies."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager

import psutil
import pytest

from cluster.chaos.throttle import Throttle, throttle_process
from doge.common.errors import UserError


@contextmanager
def busy_process():
    """A process that computes for ever."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stays_running(pid: int, seconds: float = 0.5) -> bool:
    """Whether it is never found stopped."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_stopped(pid):
            return False
        time.sleep(0.01)
    return True


def runnable_seconds(pid: int) -> tuple[float, float]:
    """Seconds that a process was on a CPU, and that it waited for one because others had it."""
    with open(f"/proc/{pid}/schedstat") as file:
        on_cpu, waited, _ = map(int, file.read().split())
    return on_cpu / 1e9, waited / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 1 / 3, 0.7])
def test_a_throttled_process_gets_its_share(share):
    with busy_process() as pid, throttle_process(pid, share) as throttle:
        start, (cpu_before, waited_before) = time.monotonic(), runnable_seconds(pid)
        time.sleep(3)
        seconds, (cpu_after, waited_after) = time.monotonic() - start, runnable_seconds(pid)
        assert throttle.end() == pytest.approx(share, abs=0.05)  # whoever stops it may itself wait for a CPU
    cpu, waited = (cpu_after - cpu_before) / seconds, (waited_after - waited_before) / seconds
    print(f"asked {share:.3f}: on a CPU {cpu:.3f}, waited for one {waited:.3f}")
    # On an idle machine nothing is waited for, so both bounds hold for the CPU time; on a busy one it had its chance.
    assert cpu < share + 0.05
    assert cpu + waited > share - 0.05


def test_a_process_is_throttled_inside_the_block_alone():
    with busy_process() as pid:
        with throttle_process(pid, 0.0):
            wait_for(lambda: is_stopped(pid))
            before = runnable_seconds(pid)[0]
            time.sleep(0.3)
            assert runnable_seconds(pid)[0] == before
        assert stays_running(pid)
        with pytest.raises(ZeroDivisionError), throttle_process(pid, 0.1) as throttle:
            1 / 0  # noqa: B018
        assert throttle.achieved < 0.9
        assert stays_running(pid)


@pytest.mark.slow
def test_a_throttle_ends_by_itself_after_its_seconds():
    with busy_process() as pid:
        throttle = Throttle(pid, 0.0, seconds=2.0)
        wait_for(lambda: is_stopped(pid))
        wait_for(lambda: not is_stopped(pid))
        assert stays_running(pid)
        assert throttle.end() == 0.0


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_killed_owner_leaves_nothing_stopped(share):
    code = f"""
        import sys, time
        from cluster.chaos.throttle import throttle_process

        with throttle_process(int(sys.argv[1]), {share}):
            print("throttled", flush=True)
            time.sleep(60)
    """
    with busy_process() as pid:
        command = [sys.executable, "-c", textwrap.dedent(code), str(pid)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
            assert owner.stdout.readline() == b"throttled\n"
            wait_for(lambda: is_stopped(pid))
            owner.kill()
        wait_for(lambda: not is_stopped(pid))
        time.sleep(0.2)
        assert stays_running(pid)


def test_a_killed_holder_leaves_nothing_stopped():
    with busy_process() as pid:
        throttle = Throttle(pid, 0.0)
        wait_for(lambda: is_stopped(pid))
        mark = str(pid)
        holders = [
            process
            for process in psutil.process_iter(["cmdline"])
            if mark in (process.info["cmdline"] or []) and "0.0" in process.info["cmdline"]
        ]
        assert holders
        for holder in holders:
            holder.kill()
        wait_for(lambda: not is_stopped(pid))
        throttle.end()


def test_a_victim_that_dies_ends_its_throttle():
    with busy_process() as pid:
        throttle = Throttle(pid, 0.5)
        os.kill(pid, signal.SIGKILL)
    throttle.end()


def test_a_process_that_is_not_there_is_an_error():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(ProcessLookupError, match=f"no process {process.pid}"), throttle_process(process.pid, 0.5):
        pass
    with pytest.raises(UserError, match="below 1, not 1"), throttle_process(os.getpid(), 1.0):
        pass
