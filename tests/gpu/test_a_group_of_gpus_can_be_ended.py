"""On two GPUs: NCCL's group is ended while a rank waits in it, and the same processes meet in another."""

import multiprocessing
import threading

import pytest
import torch

from doge.common.network import free_address
from doge.training.communicator import CommunicationError, Communicator

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def rank(number: int, addresses: list[tuple[str, int]], results) -> None:
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    found = []
    first = Communicator(number, 2, addresses[0], device=device)
    ones = torch.ones(1 << 22, device=device)
    first.all_reduce(ones)
    found.append(ones.sum().item() / ones.numel())
    if number == 0:  # rank 1 never comes
        threading.Timer(2.0, first.abort).start()
        try:
            first.all_reduce(ones)
            torch.cuda.synchronize(device)
            found.append("exchanged")
        except (CommunicationError, RuntimeError):
            found.append("ended")
    first.close()
    second = Communicator(number, 2, addresses[1], device=device)
    twos = torch.full((1 << 22,), 2.0, device=device)
    second.all_reduce(twos)
    found.append(twos.sum().item() / twos.numel())
    second.close()
    results.put((number, found))


def test_a_rank_that_waits_on_a_gpu_is_woken_and_meets_the_other_again():
    context = multiprocessing.get_context("spawn")
    results, addresses = context.Queue(), [free_address("127.0.0.1") for _ in range(2)]
    ranks = [context.Process(target=rank, args=(number, addresses, results)) for number in range(2)]
    for each in ranks:
        each.start()
    found = dict(results.get(timeout=120) for _ in ranks)
    for each in ranks:
        each.join(30)
    assert found[1] == [2.0, 4.0]
    assert found[0][0] == 2.0
    assert found[0][-1] == 4.0
