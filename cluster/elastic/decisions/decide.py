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
    # A thousand hosts tell twice a second how they are; what follows from that while they step, the next tick finds.
    if not (isinstance(observation, BeatHeard) and _steps_on(known)):
        commands += _go_on(known)
    return commands


def _steps_on(known: Known) -> bool:
    """Whether a membership is whole, and as far as it was."""
    phase = known.phase
    if not isinstance(phase, Running) or phase.ended_at is not None:
        return False
    return phase.at_work or not all(took_up(known, host) for host in phase.members)


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
