"""From a membership to its end: whether other hosts should train, who ends it, and what follows."""

from collections import Counter

from cluster.elastic.decisions.commands import Abort, AskToLeave, Commands, Finish, Post, StopRun
from cluster.elastic.decisions.known import (
    NOTHING,
    WATCH_SECONDS,
    Gathering,
    HostRecord,
    Known,
    Over,
    Pausing,
    Running,
    Trouble,
)
from cluster.elastic.decisions.observations import MemberEnded
from cluster.elastic.decisions.staffing import commit_newest, end_surplus, mark_lost, start_missing, wanted
from cluster.elastic.decisions.watching import grace, stalled
from cluster.elastic.events import Message
from cluster.elastic.membership import Outcome, node_name
from doge.common.words import duration

RECYCLES = 2  # memberships in a row that a place may break before it is left out
BARRED_SECONDS, LONGEST_BARRED_SECONDS = 600.0, 7200.0  # that it is left out for
PAUSE_SECONDS = 30.0  # the longest one between attempts
ARRIVE_SECONDS = 90.0  # that a host which is ready waits for others that start
WORTH = 5  # times what it took to enter, that a membership lasts at least before it is ended for more hosts
HURRY_SECONDS = 5.0  # a step that takes longer is given up where somebody has to go: a notice may be of 30 s
ABORT_SECONDS = 1.0  # from a loss until the members that have not noticed it are told


def member_ended(known: Known, host: HostRecord, ended: MemberEnded) -> None:
    host.busy, host.given_up = False, None
    phase = known.phase
    if isinstance(phase, Running) and host in phase.pending:
        phase.pending.remove(host)
        phase.outcomes[host] = ended.outcome
        if phase.ended_at is None and ended.outcome.kind not in ("finished", "left"):
            phase.ended_at = known.now


def oversee(known: Known, phase: Running) -> Commands:
    """Follow a membership until each of its members has ended it, is lost, or is silent after it broke."""
    for host in [host for host in phase.pending if host.lost]:
        phase.pending.remove(host)
        if phase.ended_at is None:
            phase.ended_at = known.now
    if phase.ended_at is None and stalled(known, phase.pending):
        phase.ended_at, phase.stalled = known.now, True
    if phase.pending and phase.ended_at is None:
        yield from _keep_fitting(known, phase)
        return
    if phase.hurried and phase.outcomes:
        yield from _commit_soon(known, phase)
    if phase.pending and phase.ended_at is not None:
        yield from _wake(known, phase, phase.ended_at)
    if not phase.pending:
        if known.lost_at is None:
            known.lost_at = phase.ended_at
        yield from _judge(known, phase)


def _keep_fitting(known: Known, phase: Running) -> Commands:
    """Start and end hosts beside a whole membership, and end it where other hosts should train."""
    if known.interrupted:
        yield from _let_go(known, phase)
        return
    if not phase.at_work and all(took_up(known, host) for host in phase.members):
        phase.at_work = True
        yield from end_surplus(known)  # all members have the state; its former holder may exit
    yield from start_missing(known, spares=phase.at_work)
    better = wanted(known)
    if any(host.node in known.leaving for host in phase.members):
        yield from _let_go(known, phase)
    elif phase.asked_at is None and len(better) >= known.enough and _is_worth_it(known, phase, better):
        yield from _ask_to_leave(known, phase)


def _let_go(known: Known, phase: Running) -> Commands:
    """End a membership of which somebody has to go, whoever is left.

    At the next step that all agree on, which may be the one after this; at once where that takes long and everybody's
    state is whole.
    """
    seconds = max(host.beat.step_seconds for host in phase.pending) or float("inf")  # of a first step nothing is known
    late = phase.asked_at is not None and known.now - phase.asked_at > 2 * HURRY_SECONDS  # there may be no data, say
    whole = all(
        took_up(known, host)
        and host.beat.activity != "commit"  # it may be the last one, which nobody else would write
        and (host.beat.held or NOTHING).step >= host.beat.step
        for host in phase.pending
    )
    if whole and (seconds > HURRY_SECONDS or late):
        phase.hurried, phase.aborted, phase.ended_at = True, True, known.now
        for host in phase.pending:
            yield Abort(host.name, known.number)
    elif phase.asked_at is None:
        yield from _ask_to_leave(known, phase)


def _commit_soon(known: Known, phase: Running) -> Commands:
    """Let the newest state be written as soon as one member has ended a hurried membership: another may be stuck."""
    holder = known.newest()
    if holder is not None and (holder.beat.held or NOTHING) > phase.committed:
        phase.committed = holder.beat.held or NOTHING
        yield from commit_newest(known)


def _ask_to_leave(known: Known, phase: Running) -> Commands:
    phase.asked_at = known.now
    for host in phase.pending:
        yield AskToLeave(host.name, known.number)


def _is_worth_it(known: Known, phase: Running, better: list[HostRecord]) -> bool:
    """Whether to end a membership for one of other hosts.

    Those that arrive wait for others that are about to be ready, and until
    the membership has lasted several times as long as it took to enter.
    """
    if set(better) == set(phase.members):
        return False
    if not set(phase.members) <= set(better):
        return True
    arriving = [host for host in known.starting() if not host.spare and known.now - host.started < ARRIVE_SECONDS]
    cost = max(host.beat.enter_seconds for host in phase.members)
    return not arriving and phase.at_work and known.now - phase.formed_at >= WORTH * cost


def took_up(known: Known, host: HostRecord) -> bool:
    """Whether a member has taken up the state of the present membership."""
    return host.beat.membership == known.number and host.beat.stage.at_work


def _wake(known: Known, phase: Running, ended_at: float) -> Commands:
    """Tell the other members of a broken membership, and kill those that stay stuck in it.

    Where all of them are silent, the others go on: a silent one finds its membership gone when it comes back.
    """
    since = known.now - ended_at
    silent = not any(known.answers(host) for host in phase.pending)
    if (since > ABORT_SECONDS or silent) and not phase.aborted:
        phase.aborted = True
        for host in phase.pending:
            yield Abort(host.name, known.number)
    for host in list(phase.pending):
        if silent:
            host.given_up = known.now
            phase.pending.remove(host)
        elif known.answers(host) and since > grace(known, host):
            host.victim = True
            yield from mark_lost(known, host, "it could not be woken from waiting for a lost one")
            phase.pending.remove(host)


def _judge(known: Known, phase: Running) -> Commands:
    """Draw the consequences of a membership's end."""
    outcomes = list(phase.outcomes.values())
    kinds = Counter(outcome.kind for outcome in outcomes)
    rank_0 = phase.outcomes.get(phase.members[0])  # writes the last checkpoint, and has finished when that is there
    if rank_0 is not None and rank_0.kind == "finished":
        yield from over(known)
        return
    known.stopped = known.stopped or kinds["stopped"] > 0
    # A member that cannot tell its outcome has told its step before.
    beats = [host.beat.step for host in phase.members if host.beat.membership == known.number]
    reached = max([phase.first, *(outcome.step for outcome in outcomes), *beats])
    progress = reached > known.reached
    known.reached = max(known.reached, reached)
    lost = [host for host in phase.members if host.lost]
    failed = {host: phase.outcomes[host] for host in phase.members if _is_own(phase.outcomes.get(host))}
    yield from _recycle(known, failed)
    for host in [host for host in known.hosts.values() if host.lost]:
        del known.hosts[host.name]
    known.phase = Gathering()
    if outcomes and kinds["left"] == len(outcomes):
        return
    if phase.hurried:
        yield Post(Message(f"Step {reached + 1:,} was given up: workers have to go before it would be made."))
        return
    if known.stopped:
        return
    reasons = [outcome.reason for outcome in outcomes if outcome.kind == "full"]
    reasons += [outcome.reason.rstrip(".") for outcome in failed.values()]
    reasons += [f"a worker was lost ({host.reason})" for host in lost if not host.victim]
    reasons += ["a worker does not answer, or not the others"] * phase.stalled
    reasons += [outcome.reason for outcome in outcomes if outcome.kind == "broken"]
    reasons += [f"a worker was lost ({host.reason})" for host in lost]
    reasons = reasons or ["a worker does not answer"]
    yield Post(Message(f"Step {reached + 1:,} was interrupted: {reasons[0]}."))
    if any(host.node in known.leaving for host in known.alive()):
        yield from commit_newest(known)
    if progress:
        known.failures = -1
        for host in phase.members:
            known.troubles.pop(host.place, None)
    culprits = {host: host.reason for host in lost if not host.victim}
    culprits |= {host: outcome.reason for host, outcome in failed.items()}
    if len(culprits) < len(phase.members):  # what befalls all is no single machine's trouble
        yield from _blame(known, culprits)
    yield from note_failure(known, reasons[0])
    if kinds["unable"] and not known.stopped:
        known.phase = Pausing(known.now + pause_seconds(known))


def _is_own(outcome: Outcome | None) -> bool:
    """Whether a host ended its membership by an error of its own, of which others' are symptoms."""
    return outcome is not None and outcome.kind in ("failed", "unable")


def _recycle(known: Known, failed: dict[HostRecord, Outcome]) -> Commands:
    """End the processes whose errors nobody foresaw: another one may do better in their place."""
    for host, outcome in failed.items():
        if outcome.kind == "failed":
            yield from mark_lost(known, host, outcome.reason)


def _blame(known: Known, culprits: dict[HostRecord, str]) -> Commands:
    """Leave a place out for a while where hosts broke several memberships in a row, unless it is needed."""
    for place, host in {host.place: host for host in culprits}.items():
        trouble = known.troubles.setdefault(place, Trouble())
        trouble.failures += 1
        trouble.reason = culprits[host].rstrip(".")
        others = sum(number for other, number in known.places().items() if other != place)
        if trouble.failures > RECYCLES and others >= known.enough:
            again = trouble.failures - RECYCLES - 1
            seconds = min(BARRED_SECONDS * 2.0**again, LONGEST_BARRED_SECONDS)
            trouble.until = known.now + seconds
            machine = host.info.machine if host.info is not None else ""
            yield Post(
                Message(
                    f"The worker on {node_name(machine, host.node)} is left out for {duration(seconds)}: it broke "
                    f"{trouble.failures} memberships in a row ({trouble.reason})."
                )
            )


def note_failure(known: Known, reason: str) -> Commands:
    """Count a failure without a new step; one too many ends the run."""
    known.failures += 1
    if 0 <= known.scaling.max_failures < known.failures:
        yield StopRun(
            f"The workers failed {known.failures} times without making a new step ({reason.rstrip('.')}): "
            "run the same command to resume from the last checkpoint."
        )
        known.stopped = True


def pause_seconds(known: Known) -> float:
    """How long to wait before another attempt, ever longer with failures in a row."""
    return min(WATCH_SECONDS * 2.0 ** min(known.failures, 9), PAUSE_SECONDS)


def over(known: Known) -> Commands:
    known.stopped = True
    known.phase = Over()
    yield Finish()
