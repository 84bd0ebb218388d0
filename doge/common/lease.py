"""One writer per run: the writer holds a lease, a small file in the run's directory that it keeps renewing.

with Lease(storage / "runs/NAME", "the training of NAME") as lease:
    ...  # ``lease.claim`` may be sent to other processes, which call ``claim.check()`` before they commit
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
from doge.common.machine import process_space, process_start
from doge.common.storage import Storage, StorageError

FILE = "lease.json"
INTERVAL_SECONDS = 5.0  # between two renewals
PATIENCE = 2.5  # intervals without a renewal after which the holder is considered dead
SETTLE_SECONDS = 1.0  # between writing a lease and reading it back, in case another process wrote at the same time


class LeaseLost(UserError):
    """The lease is no longer ours: another process took it over, or the file was removed."""


@dataclass(frozen=True)
class Claim:
    """Identifies the holder of a run's lease; can be sent to other processes.

    Args:
        storage: The run's directory.
        owner: Random id of the lease.
    """

    storage: Storage
    owner: str

    def still_held(self) -> bool:
        """Whether the lease is still ours. Raises StorageError if it cannot be read."""
        content = _parse(_read(self.storage))
        return content is not None and content["owner"] == self.owner

    def check(self) -> None:
        """Raise LeaseLost unless the lease is still ours, and StorageError if it cannot be read."""
        other = _parse(_read(self.storage))
        if other is None:
            raise LeaseLost(
                f"The lease of {self.storage.root} was removed, so this run may no longer commit: run the same command "
                "again to resume from the last commit."
            )
        if other["owner"] != self.owner:
            raise LeaseLost(
                f"The run in {self.storage.root} was taken over by {_who(other)}, so this process may no longer "
                "commit: leave the run to that one, or choose another --name."
            )


class Lease:
    """The right to write to a run; released on exit.

    Clocks of different machines are never compared. A lease whose process died on this machine is taken over at once,
    any other if it is not renewed during 2.5 of its own intervals.

    Args:
        storage: The run's directory.
        holder: Description of the holder for messages, such as ``the training of NAME``.
        on_lost: Called once, from the renewing thread, with a sentence that says why the lease was lost.
        interval: Seconds between two renewals.
    """

    def __init__(
        self,
        storage: Storage,
        holder: str,
        on_lost: Callable[[str], None] = lambda message: None,
        interval: float = INTERVAL_SECONDS,
    ):
        self.claim = Claim(storage, uuid.uuid4().hex)
        self._content: dict[str, Any] = {
            "owner": self.claim.owner,
            "holder": holder,
            "host": socket.gethostname(),
            "machine": process_space(),
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "interval": interval,
            "counter": 0,
        }
        self._on_lost, self._interval = on_lost, interval
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lease and keep renewing it. Raises UserError if another live process holds it."""
        storage = self.claim.storage
        while not _is_free(storage):
            pass  # its owner changed: watch the new one
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
        """Whether the lease is still ours. Raises StorageError if it cannot be read."""
        return self.claim.still_held()

    def release(self) -> None:
        """Stop renewing, and remove the lease if it is still ours."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)  # a storage that hangs must not delay the end
        with suppress(StorageError, OSError):  # other processes notice that it is no longer renewed
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
            except Exception:  # the storage fails for now, and whoever writes there gets its error
                continue


def _is_free(storage: Storage) -> bool:
    """Watch a lease: True once it is free, False if its owner changed. Raises UserError if its holder is alive."""
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
    """The content of a lease; None if there is none or it is damaged."""
    try:
        found: dict[str, Any] = json.loads(content or b"")
        return found if {"owner", "holder", "host", "pid", "interval"} <= found.keys() else None
    except (ValueError, AttributeError):
        return None


def _died_here(content: dict[str, Any]) -> bool:
    """Whether a lease's process ran on this machine and has ended; its pid may belong to another process by now."""
    start = content.get("process_start")
    if start is None or content.get("machine") is None or content["machine"] != process_space():
        return False
    return bool(process_start(content["pid"]) != start)
