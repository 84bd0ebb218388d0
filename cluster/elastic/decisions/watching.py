"""Who is stuck: hosts that do not answer, or do not move."""

from cluster.elastic.decisions.commands import AskForBeat, Commands, StopRun
from cluster.elastic.decisions.known import HostRecord, Known, Questioning
from cluster.elastic.decisions.observations import BeatHeard, HostFailed
from cluster.elastic.decisions.staffing import look_at_nodes, mark_lost
from cluster.elastic.workload import Stage

FLUSH_SECONDS = 120.0  # for the checkpoint of a host that is no longer needed
KILL_SECONDS = 6.0  # grace before killing a host that is stuck waiting for a lost peer
BUILD_SECONDS = 20.0  # the same for one that builds an engine, which may be computing or waiting


def watch(known: Known) -> Commands:
    """Look at the nodes, mark the hosts lost that have been silent for too long, and ask all others how they are."""
    if not known.looks:
        yield from look_at_nodes(known)
    patience = known.scaling.hang_timeout_s
    for host in known.alive():
        if host.given_up is not None and not known.answers(host):
            host.given_up = known.now
        # At the tick before this one it was silent already: an answer that waited while nobody listened has been heard.
        if host.info is not None and known.ticked - host.answered > patience:
            yield from mark_lost(known, host, f"no answer for {patience:g} seconds")
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


def beat_heard(known: Known, host: HostRecord, heard: BeatHeard) -> Commands:
    host.beat, host.asked = heard.beat, False
    if isinstance(known.phase, Questioning):
        known.phase.unheard.discard(host)
    stuck = host.beat.seconds
    patience = known.scaling.hang_timeout_s
    slow = max(patience, 20 * host.beat.step_seconds or 10 * patience)
    ending = any(member.lost for member in known.members)  # a host that waited for a lost one stops waiting
    if host.computes and stuck > slow and not ending:
        yield from mark_lost(known, host, f"no progress in a step for {stuck:.0f} seconds")


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
    if host.beat.waiting:
        return KILL_SECONDS
    if host.beat.stage is Stage.BUILDING:
        return BUILD_SECONDS
    if host.gpus and host.beat.stage is Stage.STEPPING:
        return max(KILL_SECONDS, step)
    return max(known.scaling.hang_timeout_s, step)
