"""What happens when, and to whom: pure functions of a seed."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

Kind = Literal["kill-worker", "kill-rank-0", "kill-node", "pause", "throttle"]


@dataclass(frozen=True)
class Disturbance:
    """What is to happen.

    Args:
        number: from 1.
        at: seconds since the start.
        kind: of disturbance.
    """

    number: int
    at: float
    kind: Kind

    def __str__(self) -> str:
        return f"{self.at:8.1f} s  {self.kind}"


@dataclass(frozen=True)
class Victim:
    """A worker as its run's coordinator describes it.

    Args:
        host: its name.
        node: Ray's id of its node.
        pid: of its process there.
        rank: in the membership that trains; None for a spare.
        step: that it is at.
    """

    host: str
    node: str
    pid: int
    rank: int | None
    step: int


def schedule(seed: int, every: float, kinds: tuple[Kind, ...], duration: float = math.inf) -> Iterator[Disturbance]:
    """The events that come before ``duration`` seconds: a pure function of its arguments.

    The times between them are exponentially distributed with the mean ``every`` (a Poisson process), the kinds uniform
    over ``kinds``. A longer duration only adds events.
    """
    chance, at = Random(seed), 0.0
    for number in itertools.count(1):
        at += chance.expovariate(1 / every)
        if at >= duration:
            return
        yield Disturbance(number, at, chance.choice(kinds))


def choose(
    members: Iterable[Victim], seed: int, number: int, rank: int | None = None, spares: bool = False
) -> Victim | None:
    """Whom event ``number`` meets, or the one of ``rank``; None if nobody can be.

    A pure function, also of the order of ``members``. With ``spares``, hosts that only wait are met too.
    """
    candidates = [member for member in members if spares or member.rank is not None]
    if rank is not None:
        return next((member for member in candidates if member.rank == rank), None)
    candidates.sort(key=lambda member: (math.inf if member.rank is None else member.rank, member.host))
    return Random(f"{seed}/{number}").choice(candidates) if candidates else None


def choose_node(members: Iterable[Victim], protected: Iterable[str], seed: int, number: int) -> str | None:
    """The node that event ``number`` meets: one with a worker and not protected. None if there is none."""
    candidates = sorted({member.node for member in members if member.rank is not None} - set(protected))
    return Random(f"{seed}/{number}").choice(candidates) if candidates else None
