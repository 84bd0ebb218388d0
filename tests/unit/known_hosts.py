"""What a coordinator knows of made-up hosts, and what is looked for in its commands."""

from typing import Any

from cluster.elastic.decisions.commands import Post
from cluster.elastic.decisions.decide import decide
from cluster.elastic.decisions.known import WATCH_SECONDS, HostRecord, Known, Running
from cluster.elastic.decisions.observations import BeatHeard, Tick
from cluster.elastic.events import Message
from cluster.elastic.membership import HostInfo, Member, Membership, Seat, StateId
from cluster.elastic.workload import Beat, Stage
from cluster.machines.scaling import ScalingRecipe


def host(name: str, now: float = 100.0, **changes: Any) -> HostRecord:
    """A host that is ready; its node is the first letter of its name."""
    record = HostRecord(name, name[0], spare=False, started=now - 50, answered=now)
    record.info = HostInfo(hash(name) % 1000, name[0], "127.0.0.1")
    for key, value in changes.items():
        setattr(record, key, value)
    return record


def known(*hosts: HostRecord, seats: str = "ab", **scaling: Any) -> Known:
    """What is known of these hosts, with a seat on each of the nodes."""
    state = Known(ScalingRecipe(**{"num_workers": (1, 2), "warm_spares": 0} | scaling), now=100.0, ticked=99.5)
    state.seats = tuple(Seat("group", rank, len(seats), node) for rank, node in enumerate(seats))
    state.hosts = {each.name: each for each in hosts}
    state.looks = 1  # one is under way
    return state


def running(*members: HostRecord, others: tuple[HostRecord, ...] = (), seats: str = "ab", **scaling: Any) -> Known:
    """What is known while a membership of these hosts steps."""
    state = known(*members, *others, seats=seats, **scaling)
    ranks = tuple(Member(member.name, member.node, member.node) for member in members)
    membership = Membership(1, ranks, ("127.0.0.1", 1))
    state.number, state.holder = 1, members[0]
    state.phase = Running(membership, list(members), 0, pending=list(members), at_work=True)
    for member in members:
        member.used = member.busy = True
        member.beat = Beat(Stage.STEPPING, membership=1)
    return state


def says(commands: list, text: str) -> bool:
    return any(isinstance(c, Post) and isinstance(c.event, Message) and text in c.event.text for c in commands)


def of(kind: type, commands: list) -> list:
    return [command for command in commands if isinstance(command, kind)]


def passing(state: Known, until: float, beats: dict[str, Beat]) -> list:
    """Let time pass until ``until``, a tick every half second and a beat of these hosts with each; all commands."""
    commands, now = [], state.now
    while now < until:
        now += WATCH_SECONDS
        for name, beat in beats.items():
            commands += decide(state, BeatHeard(name, beat), now)
        commands += decide(state, Tick(), now)
    return commands


def answers(state: Known, *held: StateId | None) -> list:
    """All hosts that were asked say, in order, what they hold; returns the commands after the last answer."""
    for name, each in zip(list(state.hosts), held, strict=True):
        commands = decide(state, BeatHeard(name, Beat(Stage.IDLE, held=each)), 100.2)
    return commands
