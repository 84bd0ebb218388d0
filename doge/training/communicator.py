"""Ranks that exchange tensors, in a group that any thread can end at once.

Torch's own groups are not enough for machines that vanish: a rank that waits in gloo for a peer whose plug was pulled
waits for ever, and nothing wakes it. A `Communicator` knows its connections and shuts them down.

This file builds on private interfaces of torch, and on what gloo's sockets look like: checked with torch 2.13.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from doge.training.number_exchange import NumberExchange

JOIN_SECONDS = 60.0  # for all ranks to be there
CONNECT_SECONDS = 10.0  # for the connections between ranks that are
POLL_SECONDS = 0.01
CHUNK = 1 << 20  # elements that are exchanged at once, so that progress is seen on a slow network too
_FOREVER = timedelta(days=365)  # a peer that is only slow is waited for
_KEEP_ALIVE = {socket.TCP_KEEPIDLE: 5, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 5}  # seconds, seconds, probes
_making = threading.Lock()  # of a device of gloo, whose address is the one that is new in this process

Address = tuple[str, int]


class CommunicationError(RuntimeError):
    """A peer is gone or does not come, or the group was ended: never this rank's own fault."""


def is_symptom(error: BaseException) -> bool:
    """Whether an error says that a peer or the connection to it is gone, rather than what is wrong here."""
    if isinstance(error, CommunicationError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("gloo/", "Gloo ", "NCCL"))


class Communicator:
    """One rank's place in a group: NCCL between GPUs, gloo between CPUs, and a `NumberExchange`.

    Args:
        rank: of this process.
        size: number of ranks.
        address: host and port where rank 0 listens.
        host: address of this machine under which the others reach it.
        device: of the tensors.
        abandoned: whether the group is not wanted any more; asked while it is waited for.

    Raises:
        CommunicationError: not all ranks came within a minute, or the group was abandoned.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        address: Address = ("127.0.0.1", 0),
        host: str = "127.0.0.1",
        device: torch.device | None = None,
        abandoned: Callable[[], bool] = lambda: False,
    ):
        self.rank, self.size = rank, size
        self.device = device or torch.device("cpu")
        self.progress = 0  # chunks that were exchanged
        self.store: dist.Store | None = None  # through which the ranks found each other; none where there is but one
        self._addresses: set[Address] = {address}  # at which ranks listen, this one included
        self._ended = threading.Event()
        self._is_abandoned = abandoned
        self._lock = threading.Lock()  # of the end of NCCL's group
        self._numbers: NumberExchange | None = None
        self._gloo: Any = None
        self._nccl: Any = None
        if size > 1:
            try:
                with _communication("The workers could not meet"):
                    self._join(address, host)
            except BaseException:
                self.close()
                raise

    def all_reduce(self, *tensors: torch.Tensor) -> None:
        """Replace every tensor by its sum over all ranks, the same bits on each.

        Raises:
            CommunicationError: a peer is gone, or the group was ended; the tensors hold anything then.
        """
        for chunk in self._chunks(tensors):
            self._exchange(chunk, lambda group, chunk: group.allreduce([chunk]))

    def broadcast(self, *tensors: torch.Tensor) -> None:
        """Replace every tensor by rank 0's. Raises CommunicationError."""
        for chunk in self._chunks(tensors):
            self._exchange(chunk, lambda group, chunk: group.broadcast([chunk], _root()))

    def all_gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, by rank, exactly; as many of each, at least one. Raises CommunicationError."""
        if self.size == 1:
            return [list(numbers)]
        with _communication("A worker is gone"):
            if self.ended or self._numbers is None:
                raise CommunicationError("the group was ended")
            found = self._numbers.all_gather(numbers)
        self.progress += 1
        return found

    def abort(self) -> None:
        """End the group at once, also for a thread of this process that waits in it. Thread-safe."""
        self._ended.set()
        for connection in self._connections():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._abort_nccl()  # last, for it may wait itself

    def close(self) -> None:
        """Leave the group; what hangs in it on a GPU is ended."""
        self._ended.set()
        numbers, self._numbers, self._gloo, self.store = self._numbers, None, None, None
        if numbers is not None:
            numbers.close()
        self._abort_nccl()

    def _abort_nccl(self) -> None:
        """Once, whoever comes first: a thread that leaves the group, or one that ends it meanwhile."""
        with self._lock:
            nccl, self._nccl = self._nccl, None
            if nccl is not None:
                nccl.abort()

    @property
    def ended(self) -> bool:
        return self._ended.is_set() or self._is_abandoned()

    def _join(self, address: Address, host: str) -> None:
        deadline = time.monotonic() + JOIN_SECONDS
        is_first = self.rank == 0
        if not is_first:
            self._wait_for(lambda: _listens(address), deadline, "the first worker does not listen")
        store = dist.TCPStore(
            *address, is_master=is_first, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_SECONDS)
        )
        self.store = store
        with _making:
            before = set(_listening())
            device = dist.ProcessGroupGloo.create_device(hostname=host)
            own = next((each for each in _listening() if each not in before), (host, 0))
        self._addresses.add(own)
        store.set(f"address/{self.rank}", f"{own[0]} {own[1]}")
        keys = [f"address/{rank}" for rank in range(self.size)]
        self._wait_for(lambda: store.check(keys), deadline, "not all of them came")
        for key in keys:
            at, port = store.get(key).decode().split()
            self._addresses.add((at, int(port)))
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in its stub
        options._devices, options._threads, options._timeout = [device], 2, timedelta(seconds=CONNECT_SECONDS)
        gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), self.rank, self.size, options)
        gloo._set_default_timeout(_FOREVER)
        self._numbers = NumberExchange(self.rank, self.size, store, host)
        self._addresses |= self._numbers.addresses
        for connection in self._connections():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEP_ALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._gloo = gloo
        if self.device.type == "cuda":
            self._nccl = dist.ProcessGroupNCCL(
                dist.PrefixStore("nccl", store), self.rank, self.size, dist.ProcessGroupNCCL.Options()
            )
        store.set_timeout(_FOREVER)
        if self._nccl is not None:  # it is created in its first exchange: now, while all are here
            self._nccl.allreduce([torch.zeros(1, device=self.device)]).wait()
            torch.cuda.synchronize(self.device)
        if self.ended:
            raise CommunicationError("the group was abandoned")

    def _wait_for(self, condition: Callable[[], bool], deadline: float, trouble: str) -> None:
        while not condition():
            if self.ended:
                raise CommunicationError("the group was abandoned")
            if time.monotonic() > deadline:
                raise CommunicationError(f"{trouble} within {JOIN_SECONDS:g} s")
            time.sleep(POLL_SECONDS)

    def _chunks(self, tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield what to exchange: parts of large tensors in place, small ones put together and taken apart again."""
        if self.size == 1:
            return
        small: list[torch.Tensor] = []
        for tensor in tensors:
            if tensor.is_contiguous() and tensor.numel() >= CHUNK // 4:
                yield from tensor.view(-1).split(CHUNK)
                continue
            if small and (sum(each.numel() for each in small) >= CHUNK or small[0].dtype != tensor.dtype):
                yield from _together(small)
                small = []
            small.append(tensor)
        if small:
            yield from _together(small)

    def _exchange(self, chunk: torch.Tensor, begin: Callable[[Any, torch.Tensor], Any]) -> None:
        group = self._nccl if chunk.device.type == "cuda" else self._gloo
        with _communication("A worker is gone"):
            if self.ended or group is None:
                raise CommunicationError("the group was ended")
            begin(group, chunk).wait()
        self.progress += 1

    def _connections(self) -> Iterator[socket.socket]:
        """This process's connections to the ranks and to the store, as duplicates."""
        for connection in _sockets():
            with connection, suppress(OSError):
                if {_address(connection.getsockname()), _address(connection.getpeername())} & self._addresses:
                    yield connection


@contextmanager
def _communication(sentence: str) -> Iterator[None]:
    """Raise what goes wrong as a CommunicationError: nothing but communication happens inside."""
    try:
        yield
    except CommunicationError as error:
        raise CommunicationError(f"{sentence}: {error}") from None
    except (RuntimeError, OSError, ValueError) as error:
        raise CommunicationError(f"{sentence}: {' '.join(str(error).split())[:160]}") from error


def _together(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    together = torch.cat([tensor.detach().flatten() for tensor in tensors])
    yield together
    for tensor, part in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def _root() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return options


def _listens(address: Address) -> bool:
    try:
        socket.create_connection(address, timeout=1.0).close()
    except OSError:
        return False
    return True


def _listening() -> list[Address]:
    """Addresses at which this process listens."""
    found = []
    for one in _sockets():
        with one, suppress(OSError):
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.append(_address(one.getsockname()))
    return found


def _address(name: tuple[Any, ...]) -> Address:
    """A socket's address; one of IPv4 may have come through a socket of IPv6."""
    return name[0].removeprefix("::ffff:"), name[1]


def _sockets() -> Iterator[socket.socket]:
    """Duplicates of this process's internet sockets."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                one = socket.socket(fileno=os.dup(int(name)))
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                    yield one
                else:
                    one.close()
