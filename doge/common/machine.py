"""What tells machines and processes apart: host names and process ids are used twice."""

import os
import sys
import threading
import time

ASIDE = 10  # what it adds to its niceness, of which each point is a fifth more or less of a core


def boot_id() -> str | None:
    """Identifies this boot of this machine; None if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:  # no Linux
        return None


def cores_id() -> str:
    """Identifies the cores that this process may run on: processes with one id share them."""
    return f"{boot_id()}/{','.join(map(str, sorted(os.sched_getaffinity(0))))}"


def process_space() -> str | None:
    """Identifies within which a process id means one process: this boot and the namespace of its ids."""
    boot = boot_id()
    return None if boot is None else f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has ended or is a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def wait_until_gone(pid: int, started: int | None, timeout_s: float) -> bool:
    """Wait for a process to end, with all that it held; returns whether it did.

    Args:
        started: what `process_start` gave for it; another process of its id is not waited for.
    """
    deadline = time.monotonic() + timeout_s
    while (now := process_start(pid)) is not None and started in (None, now):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def step_aside() -> None:
    """Let other threads have the cores first: for this one, and those that it starts, as long as they live."""
    if sys.platform == "linux":  # elsewhere a whole process has one priority
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + ASIDE)
