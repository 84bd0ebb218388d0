"""The coordinator's whole judgement: what is known, one observation and its time in; commands out.

A host that is lost ends its membership for all; the survivors and a warm spare form the next one within a second or two
and go on from the newest state that one of them holds, or from the last checkpoint. A host that comes, or one whose
node is about to go, ends it at a step that all agree on, so that nothing is repeated.
"""

from typing import assert_never

from cluster.elastic.decisions.commands import Command, Commands
from cluster.elastic.decisions.ending import member_ended, oversee, took_up
from cluster.elastic.decisions.forming import address_given, form, gather, offered, question
from cluster.elastic.decisions.known import (
    Forming,
    Gathering,
    HostRecord,
    Known,
    Over,
    Pausing,
    Questioning,
    Running,
)
from cluster.elastic.decisions.observations import (
    AddressGiven,
    BeatHeard,
    Flushed,
    FromHost,
    HostFailed,
    HostPrepared,
    MemberEnded,
    NodesSeen,
    Observation,
    Offered,
    RunInterrupted,
    RunStopped,
    SeatTaken,
    Tick,
)
from cluster.elastic.decisions.staffing import host_prepared, mark_lost, nodes_seen, take_seat
from cluster.elastic.decisions.watching import beat_heard, host_failed, watch


def decide(known: Known, observation: Observation, now: float) -> list[Command]:
    """What to do after an observation.

    Args:
        known: brought up to date in place.
        now: when the observation is dealt with, in seconds of a clock that never goes back.
    """
    known.now = now
    if isinstance(known.phase, Over):
        return []
    commands = [*_take_in(known, observation)]
    if not _can_wait(known, observation):
        commands += _go_on(known)
    return commands


def _can_wait(known: Known, observation: Observation) -> bool:
    """Whether the next tick is soon enough for what follows: a thousand hosts say the same at about one time."""
    phase = known.phase
    match observation:
        case BeatHeard() if isinstance(phase, Gathering | Pausing):
            return True
        case BeatHeard() if isinstance(phase, Questioning):
            return bool(phase.unheard)
        case BeatHeard() if isinstance(phase, Running):
            return phase.at_work or phase.ended_at is not None or not all(took_up(known, h) for h in phase.members)
        case MemberEnded() if isinstance(phase, Running):
            return bool(phase.pending) and phase.ended_at != known.now
    return False


def _take_in(known: Known, observation: Observation) -> Commands:
    if isinstance(observation, FromHost):
        host = known.hosts.get(observation.host)
        if host is not None and not host.lost:
            yield from _hear(known, host, observation)
        return
    match observation:
        case Tick():
            yield from watch(known)
        case RunStopped():
            known.stopped = True
        case RunInterrupted():
            known.interrupted = True
        case SeatTaken(seat):
            take_seat(known, seat)
        case NodesSeen():
            yield from nodes_seen(known, observation)
        case _:
            assert_never(observation)


def _hear(known: Known, host: HostRecord, observation: FromHost) -> Commands:
    if not isinstance(observation, HostFailed):
        host.answered = known.now
    match observation:
        case HostPrepared():
            yield from host_prepared(known, host, observation)
        case HostFailed():
            yield from host_failed(known, host, observation)
        case BeatHeard():
            beat_heard(known, host, observation)
        case Offered():
            yield from offered(known, host, observation)
        case AddressGiven():
            address_given(known, host, observation)
        case MemberEnded():
            member_ended(known, host, observation)
        case Flushed():
            yield from mark_lost(known, host, "")


def _go_on(known: Known) -> Commands:
    """Do what the phase asks for now, and the same of the phases that it leads to."""
    while True:
        phase = known.phase
        match phase:
            case Gathering():
                yield from gather(known)
            case Questioning():
                yield from question(known, phase)
            case Forming():
                yield from form(known, phase)
            case Running():
                yield from oversee(known, phase)
            case Pausing(until):
                if known.now >= until or known.stopped or known.interrupted:
                    known.phase = Gathering()
            case Over():
                return
        if known.phase is phase:
            return
