"""From hosts to a membership: whether there are enough, whether they answer, whose state they start from."""

from cluster.elastic.decisions.commands import (
    AskForAddress,
    AskForOffer,
    Commands,
    Commit,
    Flush,
    Post,
    RunMember,
    StopRun,
)
from cluster.elastic.decisions.ending import note_failure, over, pause_seconds
from cluster.elastic.decisions.known import (
    ANSWER_SECONDS,
    Forming,
    Gathering,
    HostRecord,
    Known,
    Pausing,
    Questioning,
    Running,
)
from cluster.elastic.decisions.observations import AddressGiven, Offered
from cluster.elastic.decisions.staffing import bind_gpus, commit_newest, hopeless, mark_lost, start_missing, wanted
from cluster.elastic.decisions.watching import ask_for_beat
from cluster.elastic.events import HostJoined, MembershipFormed, Message
from cluster.elastic.membership import Member, Membership, node_name

HICCUP_SECONDS = 15.0  # that more hosts may be silent than answer before the latter go on


def gather(known: Known) -> Commands:
    """Wait for enough ready hosts: at the start for all of the first seats', later for the smallest number allowed."""
    if known.stopped or known.interrupted:
        yield from _wind_up(known)
        return
    yield from start_missing(known, spares=False)
    if reason := hopeless(known):
        yield StopRun(f"No process for the workers could be started: {reason}.")
        known.stopped = True
        return
    if sum(known.places().values()) < known.enough:
        known.troubles.clear()  # who is left must do
    hosts = wanted(known)
    if _is_hiccup(known, hosts):
        return
    # Before the first membership, hosts that are still starting are waited for.
    if known.seats and len(hosts) >= known.enough and (known.number > 0 or not known.starting()):
        known.phase = Questioning(hosts, set(hosts), known.now)
        for host in hosts:
            yield from ask_for_beat(host)


def _is_hiccup(known: Known, hosts: list[HostRecord]) -> bool:
    """Whether so many members became silent just now that the few which answer shall not take the whole batch yet."""
    silent = [host for host in known.alive() if host.used and not known.answers(host)]
    return len(silent) > len(hosts) and known.lost_at is not None and known.now - known.lost_at < HICCUP_SECONDS


def _wind_up(known: Known) -> Commands:
    """End the hosts, once the newest state of theirs is written, and then the run."""
    holder = known.newest()
    for host in known.alive():
        if not host.used:
            yield from mark_lost(known, host, "")
        elif host.ending is None:
            host.ending = known.now
            if host is holder:
                yield Commit(host.name)
            yield Flush(host.name)
    if not known.alive():
        yield from over(known)


def question(known: Known, phase: Questioning) -> Commands:
    """Go on with the hosts that have answered, or gather again."""
    unheard = {host for host in phase.unheard if not host.lost}
    if unheard and known.now - phase.since < ANSWER_SECONDS:
        return
    hosts = [host for host in phase.hosts if host not in phase.unheard and not host.lost]
    if known.stopped or known.interrupted or len(hosts) < known.enough:
        known.phase = Gathering()
        return
    source = known.newest(hosts) or hosts[0]
    if source in hosts:
        hosts = [source, *(host for host in hosts if host is not source)]
    source.busy = True
    known.phase = Forming(hosts, source, known.now)
    others = [host for host in hosts if host is not source]
    alike = all(host.beat.held == source.beat.held is not None for host in others)
    yield AskForOffer(source.name, copy="never" if not others else "if new" if alike else "always")


def offered(known: Known, host: HostRecord, offer: Offered) -> Commands:
    host.busy = False
    if isinstance(known.phase, Forming) and host is known.phase.source:
        known.phase.offer = offer
        if not known.phase.hosts[0].lost:
            yield AskForAddress(known.phase.hosts[0].name)


def address_given(known: Known, host: HostRecord, given: AddressGiven) -> None:
    if isinstance(known.phase, Forming) and host is known.phase.hosts[0]:
        known.phase.address = given.address


def form(known: Known, phase: Forming) -> Commands:
    """Let the hosts step together once the state and the address are there."""
    if known.stopped or known.interrupted:
        known.phase = Gathering()
        return
    if not (phase.source.lost or (phase.offer and (phase.address or phase.hosts[0].lost))):
        return
    lost = [host for host in (phase.source, *phase.hosts) if host.lost]
    if lost:
        yield from _could_not_meet(known, f"a worker was lost ({lost[0].reason}).")
    elif phase.offer and phase.offer.trouble:
        yield from _could_not_meet(known, phase.offer.trouble)
    elif phase.offer and phase.address:
        if phase.offer.state and not phase.offer.copied and not all(_holds(host, phase) for host in phase.hosts):
            phase.offer, phase.source.busy = None, True  # a beat told of an older state
            yield AskForOffer(phase.source.name, copy="always")
            return
        yield from _formed(known, phase, phase.offer, phase.address)


def _holds(host: HostRecord, phase: Forming) -> bool:
    """Whether a host needs no copy of the state on offer."""
    assert phase.offer is not None
    return host is phase.source or phase.offer.state in (None, host.beat.held)


def _could_not_meet(known: Known, reason: str) -> Commands:
    yield Post(Message(f"The workers could not meet: {reason}"))
    if any(host.node in known.leaving for host in known.alive()):
        yield from commit_newest(known)
    yield from note_failure(known, reason)
    known.phase = Pausing(known.now + pause_seconds(known))


def _formed(known: Known, phase: Forming, offer: Offered, address: tuple[str, int]) -> Commands:
    known.number += 1
    bind_gpus(known, phase.hosts)
    places = {host.place for host in phase.hosts if host.gpus}
    for host in known.alive():
        if host.given_up is not None and host.place in places and host not in phase.hosts:
            yield from mark_lost(known, host, "another worker has its GPU")
    members = []
    for host in phase.hosts:
        assert host.info is not None, "a host that was asked to train is ready"
        machine = host.info.cores or host.info.machine
        members.append(Member(host.name, host.node, machine, host.gpus or (), host.predecessor))
        if not host.used:
            host.used = True
            at = known.now if host.spare else host.started
            yield Post(HostJoined(host.name, node_name(host.info.machine, host.node), at))
    step = offer.state.step if offer.state else 0
    known.reached = max(known.reached, step)
    known.holder = phase.hosts[0]
    lost_s = None if known.lost_at is None else phase.since - known.lost_at
    known.lost_at = None
    yield Post(
        MembershipFormed(
            number=known.number,
            at=phase.since,
            world_size=len(members),
            from_step=step,
            reached=known.reached,
            formed_s=known.now - phase.since,
            lost_s=lost_s,
        )
    )
    membership = Membership(known.number, tuple(members), address, offer.state)
    known.phase = Running(membership, phase.hosts, step, pending=list(phase.hosts), formed_at=known.now)
    for rank, host in enumerate(phase.hosts):
        host.busy = True
        yield RunMember(host.name, membership, rank, given=not _holds(host, phase))
