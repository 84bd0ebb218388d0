"""An address where a cluster's belongs: what it is and what to give is said at once, without a secret."""

import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from cluster.machines import connection
from cluster.machines.connection import connect
from cluster.machines.scaling import ScalingRecipe
from doge.common.errors import UserError

MISMATCH = (
    "Version mismatch: The cluster was started with:\n    Ray: 2.9.1\n    Python: 3.10.4\n"
    "This process on 10.0.0.7 was started with:\n    Ray: 2.60.0\n    Python: 3.11.9\n"
)


@pytest.fixture(autouse=True)
def nothing_is_joined(monkeypatch):
    """Any call of Ray fails the test, unless the test replaces it."""
    import ray

    def refuse(**_):
        raise AssertionError("Ray must not be asked")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", refuse)
    return monkeypatch


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("http://10.0.0.1:8265", r"is that of Ray's job server: give HOST:PORT, such as 10\.0\.0\.1:6379"),
        ("https://me:hush@ray.example.com", r"https://\*\*\*@ray.example.com .* is that of Ray's job server"),
        ("ray://10.0.0.1:10001", "is that of a Ray Client server, and the driver of a run must be on a node"),
        ("/tmp/ray", "is a path: give HOST:PORT"),
        ("~/cluster", "is a path: give HOST:PORT"),
        ("head-node", "is none of a Ray cluster: give HOST:PORT"),
        ("head-node:", "is none of a Ray cluster"),
        ("head-node:gcs", "is none of a Ray cluster"),
        ("10.0.0.1:99999", "is none of a Ray cluster"),
        ("redis://10.0.0.1:6379", "is none of a Ray cluster"),
        ("no-such-host.invalid:6379", r"No Ray cluster answers at no-such-host\.invalid:6379 \(.+\): start one"),
    ],
)
def test_what_is_no_address_of_a_cluster_is_told_what_it_is(address, sentence, monkeypatch):
    for given, environment in ((address, None), (None, address)):
        if environment:
            monkeypatch.setenv("RAY_ADDRESS", environment)
        began = time.monotonic()
        with pytest.raises(UserError, match=sentence):
            connect(ScalingRecipe(address=given))
        assert time.monotonic() - began < 10


def test_an_address_where_nothing_listens_is_said_at_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UserError, match=rf"answers at 127\.0\.0\.1:{port} \(Connection refused\): start one"):
        connect(ScalingRecipe(address=f"127.0.0.1:{port}"))


@contextmanager
def listening(says: bytes | None):
    """A server that says something to whoever connects, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError), server.accept()[0] as connection:
                connection.recv(100)
                if says is not None:
                    connection.sendall(says)
                connection.recv(100)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("says", "reason"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "what listens there is something else"), (None, "it takes too long")],
)
def test_something_else_that_listens_is_no_cluster(says, reason, monkeypatch):
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.5)
    with listening(says) as address, pytest.raises(UserError, match=rf"answers at {address} \({reason}\): start one"):
        connect(ScalingRecipe(address=address))


@pytest.mark.parametrize("wrapped", [False, True])
def test_another_version_is_named_on_both_sides(wrapped, nothing_is_joined):
    import ray

    def mismatch(**_):
        try:
            raise RuntimeError(MISMATCH)
        except RuntimeError as error:
            if not wrapped:
                raise
            raise ConnectionError("Failed to connect to Ray cluster") from error

    nothing_is_joined.setattr(ray, "init", mismatch)
    with listening(b"\0\0\x12\4\0\0\0\0\0") as head:
        for address in (None, head):
            with pytest.raises(
                UserError, match=r"runs Ray 2\.9\.1 with Python 3\.10\.4, .* Ray 2\.60\.0 with Python 3"
            ):
                connect(ScalingRecipe(address=address))


def test_whatever_else_ray_raises_is_one_sentence(nothing_is_joined):
    import ray

    def fail(**_):
        raise ValueError("something\nof Ray's own")

    nothing_is_joined.setattr(ray, "init", fail)
    with pytest.raises(UserError, match=r"of this machine cannot be joined \(something of Ray's own\): start one"):
        connect(ScalingRecipe())


def test_a_machine_without_a_cluster_starts_its_own(nothing_is_joined):
    import ray

    asked = []

    def init(address, **_):
        asked.append(address)
        if address == "auto":
            raise ConnectionError("Could not find any running Ray instance.")

    nothing_is_joined.setattr(ray, "init", init)
    assert connect(ScalingRecipe())
    assert not connect(ScalingRecipe(), start=False)
    assert asked == ["auto", "local", "auto"]
