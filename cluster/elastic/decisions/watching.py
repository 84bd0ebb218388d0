"""Who is stuck: hosts that do not answer, or do not move.

A host moves while its activity changes or its progress grows, whatever its phase lasts: a first step of an hour is as
good as one of a second, if one micro-batch after the other is done.
"""

from cluster.elastic.decisions.commands import AskForBeat, Commands, StopRun
from cluster.elastic.decisions.known import ANSWER_SECONDS, WATCH_SECONDS, Forming, HostRecord, Known, Questioning
from cluster.elastic.decisions.observations import BeatHeard, HostFailed
from cluster.elastic.decisions.staffing import look_at_nodes, mark_lost
from cluster.elastic.workload import Stage

FLUSH_SECONDS = 120.0  # for the checkpoint of a host that is no longer needed
KILL_SECONDS = 6.0  # grace before killing a host that is stuck waiting for a lost peer
BUILD_SECONDS = 20.0  # the same for one that builds an engine, which may be computing or waiting
SILENT_SECONDS = 10.0  # that all others may wait for a member that does not answer
STALL_SECONDS = 60.0  # that all members may wait for each other while nothing is exchanged
UNKNOWN = 10  # times ``hang_timeout_s`` for work whose pace is unknown: an import, a compilation, a state's loading
USUAL = 20  # times the longest time between two signs of progress that was seen before
PAUSE_SECONDS = 3 * WATCH_SECONDS  # between two ticks: the coordinator itself was stopped


def watch(known: Known) -> Commands:
    """Look at the nodes, mark the hosts lost that have been silent for too long, and ask all others how they are."""
    _forgive(known)
    if not known.looks:
        yield from look_at_nodes(known)
    patience = known.scaling.hang_timeout_s
    ending = any(member.lost for member in known.members)  # a host that waited for a lost one stops waiting
    for host in known.alive():
        if host.given_up is not None and not known.answers(host):
            host.given_up = known.now
        # At the tick before this one it was silent already: an answer that waited while nobody listened has been heard.
        if host.info is not None and known.ticked - host.answered > patience:
            yield from mark_lost(known, host, f"no answer for {patience:g} seconds")
        elif stuck := _stuck(known, host, ending):
            yield from mark_lost(known, host, stuck)
        elif host.ending is not None and known.now - host.ending > FLUSH_SECONDS:
            yield from mark_lost(known, host, "")
        elif host.given_up is not None and known.now - host.given_up > grace(known, host):
            yield from mark_lost(known, host, "it could not be woken from waiting for a lost one")
        else:
            yield from ask_for_beat(host)
    known.ticked = known.now


def ask_for_beat(host: HostRecord) -> Commands:
    """Ask a host how it is, unless it owes that answer."""
    if not host.asked:
        host.asked = True
        yield AskForBeat(host.name)


def beat_heard(known: Known, host: HostRecord, heard: BeatHeard) -> None:
    before, beat, host.beat, host.asked = host.beat, heard.beat, heard.beat, False
    if isinstance(known.phase, Questioning):
        known.phase.unheard.discard(host)
    if beat.membership != before.membership:
        host.longest = 0.0
    if (beat.membership, beat.activity, beat.progress) != (before.membership, before.activity, before.progress):
        if beat.stage is before.stage is Stage.STEPPING:
            host.longest = max(host.longest, known.now - host.moved)
        host.moved = known.now


def _forgive(known: Known) -> None:
    """Where the coordinator itself was stopped, its pause is nobody's silence."""
    pause = known.now - known.ticked
    if not PAUSE_SECONDS < pause < float("inf"):
        return
    for host in known.alive():
        host.answered += pause
        host.moved += pause
        host.started += pause if host.info is None else 0.0
        host.given_up = None if host.given_up is None else host.given_up + pause
        host.ending = None if host.ending is None else host.ending + pause
    known.ticked += pause


def _stuck(known: Known, host: HostRecord, ending: bool) -> str:
    """Why a host counts as stuck that answers; empty while it moves, or waits for others.

    Args:
        ending: whether the present membership has lost a member.
    """
    patience, beat, still = known.scaling.hang_timeout_s, host.beat, known.now - host.moved
    if host.info is None:
        limit, still = UNKNOWN * patience, known.now - host.started
        return f"not ready after {still:.0f} seconds" if still > limit else ""
    if isinstance(known.phase, Forming) and host is known.phase.source and host.busy:
        still = known.now - known.phase.since
        return f"no state offered for {still:.0f} seconds" if still > UNKNOWN * patience else ""
    if beat.waiting or beat.stage in (Stage.STARTING, Stage.IDLE) or ending:
        return ""
    paced = beat.stage is Stage.STEPPING and host.longest > 0  # a read or a write may take far longer than a pass
    limit = max(patience, USUAL * host.longest) if paced else UNKNOWN * patience
    return f"no progress in {_doing(host)} for {still:.0f} seconds" if still > limit else ""


def _doing(host: HostRecord) -> str:
    return "a step" if host.beat.stage is Stage.STEPPING else host.beat.activity


def stalled(known: Known, members: list[HostRecord]) -> bool:
    """Whether a membership will never go on: all wait for one that is silent, or for each other.

    A machine that lost its power or its network closes no connection.
    """
    heard = [host for host in members if known.now - host.answered < SILENT_SECONDS]
    if not heard or not all(host.beat.waiting for host in heard):
        return False
    alone = len(heard) < len(members) and all(known.now - host.moved > ANSWER_SECONDS for host in heard)
    stepping = all(host.beat.stage is Stage.STEPPING for host in heard)  # to gather a large state takes longer
    limit = max(STALL_SECONDS, *(USUAL * host.longest for host in heard))
    limit = limit if stepping else max(limit, UNKNOWN * known.scaling.hang_timeout_s)
    return alone or all(known.now - host.moved > limit for host in heard)


def host_failed(known: Known, host: HostRecord, failed: HostFailed) -> Commands:
    if failed.user_error:
        known.stopped = True
        yield StopRun(failed.sentence)
    yield from mark_lost(known, host, "its process died" if failed.died else f"{failed.error}: {failed.sentence}")


def grace(known: Known, host: HostRecord) -> float:
    """Seconds that a host has to end a membership that lost another.

    A host that waits for the others, and was not woken by now, never will be. One that does something of its own ends
    after its micro-batch, or its checkpoint; only on a GPU it may be a collective that the computing waits for.
    """
    step = 3 * host.beat.step_seconds
    if host.beat.stage is Stage.JOINING and host.beat.waiting:
        return BUILD_SECONDS  # it may be connecting, and gives up by itself
    if host.beat.waiting:
        return KILL_SECONDS
    if host.beat.stage is Stage.BUILDING:
        return BUILD_SECONDS
    if host.gpus and host.beat.stage is Stage.STEPPING and step:
        return max(KILL_SECONDS, step)
    return max(known.scaling.hang_timeout_s, step)
