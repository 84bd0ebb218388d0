"""Ranks as threads of one process: what they exchange, and that nobody waits for ever for one that is gone."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from doge.common.network import free_address
from doge.training import communicator
from doge.training.communicator import CHUNK, CommunicationError, Communicator


def together(size, work, host="127.0.0.1", **options):
    """What ``work(communicator)`` gives on every rank, or the error that it raises."""
    address = free_address(host)

    def one(rank):
        group = None
        try:
            group = Communicator(rank, size, address, host, **options)
            return work(group)
        except CommunicationError as error:
            return error
        finally:
            if group is not None:
                group.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def tensors(rank):
    generator = torch.Generator().manual_seed(rank)
    sizes = [(3,), (), (2, 5), (CHUNK + 7,), (0,), (CHUNK // 3,), (4,)]
    found = [torch.rand(size, generator=generator) for size in sizes]
    return [*found, torch.rand(6, generator=generator, dtype=torch.float64), torch.rand(4, 3, generator=generator).t()]


def test_every_rank_gets_the_same_sums_whatever_the_sizes():
    def work(group):
        own = tensors(group.rank)
        group.all_reduce(*own)
        return own, group.progress

    (first, progress), *others = together(3, work)
    wanted = [sum(each) for each in zip(*(tensors(rank) for rank in range(3)), strict=True)]
    for found, want in zip(first, wanted, strict=True):
        assert torch.allclose(found, want)
    for other, _ in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert progress >= 4


def test_every_rank_gets_what_the_first_one_has():
    def work(group):
        own = tensors(group.rank)
        group.broadcast(*own)
        return own

    for found in together(3, work):
        assert all(torch.equal(a, b) for a, b in zip(found, tensors(0), strict=True))


def test_a_rank_alone_needs_nobody():
    alone, numbers = Communicator(0, 1), torch.arange(3.0)
    alone.all_reduce(numbers)
    alone.broadcast(numbers)
    alone.abort()
    assert numbers.tolist() == [0.0, 1.0, 2.0]


def test_a_rank_that_waits_for_one_that_says_nothing_is_woken_and_a_stranger_keeps_its_connection():
    listener = socket.create_server(("127.0.0.1", 0))
    mine = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()
    woken = []

    def work(group):
        if group.rank == 1:  # says nothing
            while not woken:
                time.sleep(0.01)
            return None
        waiting = threading.Timer(0.3, group.abort)
        began = time.monotonic()
        waiting.start()
        try:
            group.all_reduce(torch.ones(3))
        finally:
            woken.append(time.monotonic() - began)

    error, _ = together(2, work)
    assert isinstance(error, CommunicationError)
    assert "A worker is gone" in str(error)
    assert 0.3 <= woken[0] < 3
    mine.sendall(b"still there")
    assert theirs.recv(20) == b"still there"
    for each in (mine, theirs, listener):
        each.close()


def test_every_rank_learns_the_numbers_of_all_exactly():
    own = [0.1, float("inf"), -0.0, 1e-310]

    def work(group):
        first = group.all_gather([*own, float(group.rank)])
        group.all_reduce(torch.ones(CHUNK))
        return first, group.all_gather([float("nan")]), group.progress

    for first, second, progress in together(4, work):
        assert [[*map(str, numbers)] for numbers in first] == [[*map(str, [*own, float(rank)])] for rank in range(4)]
        assert [[*map(str, numbers)] for numbers in second] == [["nan"]] * 4
        assert progress == 3
    assert Communicator(0, 1).all_gather(own) == [own]


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_who_waits_for_numbers_is_woken_whoever_is_silent(silent):
    def work(group):
        if group.rank == silent:
            time.sleep(0.5)
            return None
        threading.Timer(0.2, group.abort).start()
        began = time.monotonic()
        with pytest.raises(CommunicationError, match="A worker is gone"):
            group.all_gather([1.0])
        return time.monotonic() - began

    assert all(seconds is None or 0.1 < seconds < 3 for seconds in together(3, work))


def test_ranks_that_give_unequally_many_numbers_are_told():
    def work(group):
        return group.all_gather([1.0] * (1 + group.rank))

    assert all(isinstance(error, CommunicationError) for error in together(2, work))


def test_a_rank_that_closes_wakes_the_others_at_once():
    def work(group):
        if group.rank == 2:
            return group.close()
        began = time.monotonic()
        try:
            group.all_reduce(torch.ones(3))
        except CommunicationError:
            return time.monotonic() - began
        return None

    seconds = together(3, work)
    assert all(0 <= each < 3 for each in seconds[:2])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_nobody_joins_gives_up_when_it_is_told_and_after_its_time(rank, monkeypatch):
    began = time.monotonic()
    with pytest.raises(CommunicationError, match="could not meet: the group was abandoned"):
        Communicator(rank, 2, free_address("127.0.0.1"), abandoned=lambda: time.monotonic() - began > 0.2)
    assert time.monotonic() - began < 3
    monkeypatch.setattr(communicator, "JOIN_SECONDS", 0.2)
    with pytest.raises(CommunicationError, match=r"could not meet: .* within 0.2 s"):
        Communicator(rank, 2, free_address("127.0.0.1"))


def test_the_ranks_meet_at_the_given_address_and_keep_their_connections_alive():
    def work(group):
        found = [
            (
                {name[0].removeprefix("::ffff:") for name in (connection.getsockname(), connection.getpeername())},
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            )
            for connection in group._connections()
        ]
        group.all_reduce(torch.ones(1))
        return found

    for found in together(2, work, host="127.0.0.2"):
        assert len(found) >= 2
        assert all("127.0.0.2" in ends and alive == 1 for ends, alive in found)
