"""One writer a run: a small file in the run's directory that its holder renews while it lives.

with Lease(storage / "runs/NAME", "the training of NAME") as lease:
    ...  # ``lease.claim`` may be sent to other processes; they ask ``claim.check()`` before they commit
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from doge.common.errors import UserError
from doge.common.storage import Storage, StorageError

FILE = "lease.json"
INTERVAL_SECONDS = 5.0  # between two renewals
PATIENCE = 2.5  # intervals without a renewal after which the holder is taken for dead
SETTLE_SECONDS = 1.0  # between writing and reading again, for another who wrote at the same time


class LeaseLost(UserError):
    """Another process writes to the run now."""


@dataclass(frozen=True)
class Claim:
    """Whose a run is; can be sent to other processes.

    Args:
        storage: of the run's directory.
        owner: random id of the lease.
    """

    storage: Storage
    owner: str

    def still_held(self) -> bool:
        """Whether the lease is still ours. Raises StorageError when that cannot be read."""
        content = _parse(_read(self.storage))
        return content is not None and content["owner"] == self.owner

    def check(self) -> None:
        """Raise LeaseLost unless the lease is still ours, and StorageError when that cannot be read."""
        other = _parse(_read(self.storage))
        if other is None:
            raise LeaseLost(
                f"The lease of {self.storage.root} was removed, so that this run may not commit any more: run the same "
                "command again; it goes on from the last commit."
            )
        if other["owner"] != self.owner:
            raise LeaseLost(
                f"The run in {self.storage.root} was taken over by {_who(other)}, so that this one may not commit any "
                "more: leave it to that one, or choose another --name."
            )


class Lease:
    """The right to write to a run; released on exit.

    No clocks of different machines are compared. A lease whose process is dead on this very machine is taken over at
    once, any other if it is not renewed during 2.5 of its own intervals.

    Args:
        storage: of the run's directory.
        holder: what others are told holds it, as ``the training of NAME``.
        on_lost: is called once, from the renewing thread, with a sentence when another process has taken over.
        interval: seconds between two renewals.
    """

    def __init__(
        self,
        storage: Storage,
        holder: str,
        on_lost: Callable[[str], None] = lambda message: None,
        interval: float = INTERVAL_SECONDS,
    ):
        self.claim = Claim(storage, uuid.uuid4().hex)
        self._content = {
            "owner": self.claim.owner,
            "holder": holder,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "interval": interval,
            "counter": 0,
        }
        self._on_lost, self._interval = on_lost, interval
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lease and keep renewing it. Raises UserError when another live process holds it."""
        storage = self.claim.storage
        while not _is_free(storage):  # until it has been free, once
            pass
        self._write()
        time.sleep(SETTLE_SECONDS)
        if not self.claim.still_held():
            other = _parse(_read(storage))
            raise (
                _taken(storage, other)
                if other
                else UserError(
                    f"Another process started the run in {storage.root} at the same moment: run the same command again."
                )
            )
        self._thread.start()

    def still_held(self) -> bool:
        """Whether the lease is still ours. Raises StorageError when that cannot be read."""
        return self.claim.still_held()

    def release(self) -> None:
        """Stop renewing, and remove the file if it is still ours."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)  # a storage that hangs must not hold the end up
        with suppress(StorageError, OSError):  # others find that it is not renewed
            if self.claim.still_held():
                self.claim.storage.delete(FILE)

    def _write(self) -> None:
        self._content["counter"] += 1
        self.claim.storage.write_bytes(FILE, json.dumps(self._content, indent=1).encode())

    def _renew(self) -> None:
        while not self._released.wait(self._interval):
            try:
                self.claim.check()
                self._write()
            except LeaseLost as error:
                self._on_lost(str(error))
                return
            except Exception:  # the storage fails for now: whoever writes there is told by its own errors
                continue


def _is_free(storage: Storage) -> bool:
    """Watch a lease: True once it is free, False where it changed hands. Raises UserError while its holder lives."""
    content = _read(storage)
    held = _parse(content)
    if content is None or (held is not None and _died_here(held)):
        return True
    deadline = time.monotonic() + PATIENCE * (held["interval"] if held else INTERVAL_SECONDS)
    while time.monotonic() < deadline:
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
        now = _read(storage)
        if now is None:
            return True
        if now != content:
            new = _parse(now)
            if held is None or new is None or new["owner"] != held["owner"]:
                return False
            raise _taken(storage, new)
    return True


def _taken(storage: Storage, other: dict[str, Any]) -> UserError:
    return UserError(
        f"The run in {storage.root} is being written by {_who(other)}: stop that process first, or choose another "
        "--name."
    )


def _who(content: dict[str, Any]) -> str:
    return f"{content['holder']} (process {content['pid']} on {content['host']})"


def _read(storage: Storage) -> bytes | None:
    try:
        return storage.read_bytes(FILE)
    except FileNotFoundError:
        return None


def _parse(content: bytes | None) -> dict[str, Any] | None:
    """What a lease says, None if there is none or it was damaged."""
    try:
        found = json.loads(content or b"")
        return found if {"owner", "holder", "host", "pid", "interval"} <= found.keys() else None
    except (ValueError, AttributeError):
        return None


def _died_here(content: dict[str, Any]) -> bool:
    """Whether a lease's process ran on this very machine and is no more; its pid may belong to another one by now."""
    start = content.get("process_start")
    if start is None or content.get("machine") is None or content["machine"] != _machine():
        return False
    return _process_start(content["pid"]) != start


def _machine() -> str | None:
    """What tells machines apart whose names are the same: this boot of the kernel, and whose pids these are."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return None


def _process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is dead, or a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
