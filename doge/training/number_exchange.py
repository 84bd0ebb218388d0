"""Numbers that all ranks learn of each other, through rank 0.

A collective of gloo goes around a ring: with eight ranks on busy cores fourteen hops, each of which wakes a process,
for some bytes. Through rank 0 it is two.
"""

import socket
import struct
from collections.abc import Sequence

from torch.distributed import Store

CONNECT_SECONDS = 10.0
_KEY = "numbers"


class NumberExchange:
    """One rank's connections: of rank 0 to all others, of these to rank 0.

    Args:
        rank: of this process.
        size: number of ranks.
        store: through which all ranks find rank 0.
        host: address of this machine under which the others reach it.

    Raises:
        OSError: somebody did not come within ten seconds.
    """

    def __init__(self, rank: int, size: int, store: Store, host: str):
        self._rank = rank
        self._peers: list[socket.socket] = []  # of rank 0: the others, by rank
        try:
            if rank == 0:
                self._listen(size, store, host)
            else:
                address, port = store.get(_KEY).decode().split()
                self._peers = [socket.create_connection((address, int(port)), timeout=CONNECT_SECONDS)]
                self._peers[0].sendall(struct.pack("!I", rank))
            for peer in self._peers:
                peer.settimeout(None)  # a peer that is only slow is waited for
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            self.close()
            raise

    def all_gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, by rank, exactly as they were given; as many of each rank, at least one.

        Raises:
            OSError: a peer is gone.
            ValueError: the ranks gave unequally many.
        """
        own = struct.pack(f"!{len(numbers)}d", *numbers)
        if self._rank == 0:
            parts = [own, *(_receive(peer) for peer in self._peers)]
            if any(len(part) != len(own) for part in parts):
                raise ValueError(f"the ranks gave {[len(part) // 8 for part in parts]} numbers")
            table = b"".join(parts)
            for peer in self._peers:
                _send(peer, table)
        else:
            _send(self._peers[0], own)
            table = _receive(self._peers[0])
        found = struct.unpack(f"!{len(table) // 8}d", table)
        return [list(found[start : start + len(numbers)]) for start in range(0, len(found), len(numbers))]

    @property
    def addresses(self) -> set[tuple[str, int]]:
        """Where rank 0 listened: one end of each of these connections."""
        names = [peer.getsockname() if self._rank == 0 else peer.getpeername() for peer in self._peers]
        return {(host, port) for host, port, *_ in names}

    def close(self) -> None:
        for peer in self._peers:
            peer.close()

    def _listen(self, size: int, store: Store, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family, backlog=size) as server:
            server.settimeout(CONNECT_SECONDS)
            store.set(_KEY, f"{host} {server.getsockname()[1]}")
            found: dict[int, socket.socket] = {}
            while len(found) < size - 1:
                peer, _ = server.accept()
                self._peers.append(peer)
                peer.settimeout(CONNECT_SECONDS)
                found[struct.unpack("!I", _exactly(peer, 4))[0]] = peer
        self._peers = [found[rank] for rank in range(1, size)]


def _send(peer: socket.socket, content: bytes) -> None:
    peer.sendall(struct.pack("!I", len(content)) + content)


def _receive(peer: socket.socket) -> bytes:
    return _exactly(peer, struct.unpack("!I", _exactly(peer, 4))[0])


def _exactly(peer: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        part = peer.recv(size - len(content))
        if not part:
            raise ConnectionError("connection closed by peer")
        content += part
    return bytes(content)
