import time

from cluster.elastic.events import Message
from cluster.workloads.outbox import Outbox


def test_what_can_wait_travels_with_what_cannot():
    sent = []
    outbox = Outbox(lambda events: sent.append([event.text for event in events]), wait_seconds=60.0)
    for number in range(5):
        outbox.post(Message(str(number)), urgent=number == 3)
    assert sent == [["0", "1", "2", "3"]]
    outbox.flush()
    outbox.flush()
    assert sent[1:] == [["4"]]


def test_nothing_waits_for_long():
    sent = []
    outbox = Outbox(sent.extend, wait_seconds=0.05)
    for number in range(10):
        outbox.post(Message(str(number)), urgent=False)
    deadline = time.monotonic() + 10
    while not sent and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [event.text for event in sent] == [str(number) for number in range(10)]
