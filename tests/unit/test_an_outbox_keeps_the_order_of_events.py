import threading
import time
from collections.abc import Callable

from cluster.elastic.events import Message
from cluster.workloads.outbox import Outbox


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def texts(sent: list) -> list[str]:
    return [event.text for events in sent for event in events]


def test_what_can_wait_travels_with_what_cannot():
    sent: list = []
    outbox = Outbox(sent.append, wait_seconds=60.0)
    for number in range(3):
        outbox.post(Message(str(number)), urgent=False)
    time.sleep(0.2)
    assert sent == []
    outbox.post(Message("3"))
    wait_for(lambda: sent)
    assert texts(sent) == ["0", "1", "2", "3"]
    assert len(sent) == 1
    outbox.post(Message("4"), urgent=False)
    outbox.flush()
    assert texts(sent)[4:] == ["4"]
    outbox.flush()
    assert len(sent) == 2


def test_nothing_waits_for_long():
    sent: list = []
    outbox = Outbox(sent.append, wait_seconds=0.05)
    for number in range(10):
        outbox.post(Message(str(number)), urgent=False)
    wait_for(lambda: len(texts(sent)) == 10)
    assert texts(sent) == [str(number) for number in range(10)]


def test_nobody_who_posts_waits_for_the_sending_and_a_flush_does():
    gate, sent = threading.Event(), []

    def send(events: list) -> None:
        gate.wait(10)
        sent.append(events)

    outbox = Outbox(send)
    for number in range(100):
        outbox.post(Message(str(number)))  # would wait for ten seconds
    assert sent == []
    threading.Timer(0.1, gate.set).start()
    outbox.flush()
    assert texts(sent) == [str(number) for number in range(100)]
