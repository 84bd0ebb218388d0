"""Which hosts there should be: who is started, ended, lost, and where no host can be started."""

from collections import Counter

from cluster.elastic.decisions.commands import Commands, Commit, Flush, KillHost, LookAtNodes, Post, StartHost
from cluster.elastic.decisions.known import WATCH_SECONDS, FailedStart, HostRecord, Known
from cluster.elastic.decisions.observations import HostPrepared, NodesSeen
from cluster.elastic.events import HostLeft, HostStarted, HostStarting, Message
from cluster.elastic.membership import Seat
from doge.common.words import count

RETRY_SECONDS = 600.0  # until a spare is tried again where several could not start


def take_seat(known: Known, seat: Seat) -> None:
    """Add a seat to its group; a group that is complete replaces the seats of the one before.

    The nodes that were left out get another chance.
    """
    group = known.groups.setdefault(seat.group, {})
    group[seat.rank] = seat
    if len(group) < seat.size:
        return
    known.groups = {seat.group: group}
    known.seats = tuple(group[rank] for rank in range(seat.size))
    known.left_out.clear()
    known.tenants = {place: process for place, process in known.tenants.items() if place in known.places()}
    for vacancy in known.vacancies.values():
        vacancy.failures = 0


def start_missing(known: Known, spares: bool) -> Commands:
    """Start hosts where seats have too few; with ``spares`` also those, where the hosts of all seats are at work.

    A spare imports for half a minute: beside a host that is about to join it would only slow that one down.
    """
    misfits, members = known.misfits(), set(known.members)
    alive = known.by_node(host for host in known.alive() if host not in misfits)
    for node, seats in known.seats_by_node().items():
        if node in known.leaving or node in known.dead:
            continue
        here = alive[node]
        at_work = spares and sum(host in members for host in here) >= seats
        for place in range(len(here), seats + (known.scaling.warm_spares if at_work else 0)):
            spare = place >= seats
            if (not spare and node in known.left_out) or known.now < known.vacancy(node, spare).retry_at:
                break
            yield from _start(known, node, spare)


def _start(known: Known, node: str, spare: bool) -> Commands:
    known.names += 1
    name = f"{node[:6]}-{known.names}"
    replaces = known.to_replace > 0
    known.to_replace -= replaces
    known.hosts[name] = HostRecord(
        name, node, spare, started=known.now, answered=known.now, moved=known.now, replaces=replaces
    )
    yield Post(HostStarting(name, replaces, known.now))
    yield StartHost(name, node, aside=spare)


def host_prepared(known: Known, host: HostRecord, prepared: HostPrepared) -> Commands:
    host.info, host.moved = prepared.info, known.now
    known.vacancy(host.node, host.spare).failures = 0
    yield Post(HostStarted(host.name, known.now))


def end_surplus(known: Known) -> Commands:
    """End the hosts that are neither members nor spares of a node with seats, once what they hold is written."""
    seats, members, misfits = known.seats_by_node(), set(known.members), known.misfits()
    for node, here in known.by_node(known.alive()).items():
        room = 0 if node in known.leaving or not seats[node] else seats[node] + known.scaling.warm_spares
        fitting = sorted((host for host in here if host not in misfits), key=lambda host: host not in members)
        for host in [*fitting[room:], *(host for host in here if host in misfits)]:
            if host not in members and host.ending is None:
                host.ending = known.now
                yield Flush(host.name)


def mark_lost(known: Known, host: HostRecord, reason: str) -> Commands:
    """Mark a host lost and kill its process.

    Args:
        reason: empty if nobody needs the host any more.
    """
    if host.lost:
        return
    host.lost, host.reason = True, reason
    if host.used:
        yield Post(HostLeft(host.name, known.now))
    yield KillHost(host.name, host.node, (host.info.pid, host.info.started) if reason and host.info else None)
    if host not in known.members:
        del known.hosts[host.name]
    if host.info is None:
        yield Post(HostStarted(host.name, known.now))
        if reason:
            yield from _start_failed(known, host)
    elif reason:
        known.to_replace += 1
        known.left_out.pop(host.node, None)  # there is room again


def _start_failed(known: Known, host: HostRecord) -> Commands:
    """Try again later; `_judge_failed_starts` tells whether at all, once it is known that the node is there."""
    known.to_replace += host.replaces
    vacancy = known.vacancy(host.node, host.spare)
    if host.started < vacancy.failed_at:  # it was started beside one whose failure is known
        return
    vacancy.failures += 1
    vacancy.failed_at, vacancy.retry_at = known.now, known.now + WATCH_SECONDS * vacancy.failures
    known.failed_starts.append(FailedStart(host.node, host.spare, vacancy.failures, host.reason, known.now))
    yield from look_at_nodes(known)


def look_at_nodes(known: Known) -> Commands:
    known.looks += 1
    yield LookAtNodes(known.now)


def nodes_seen(known: Known, seen: NodesSeen) -> Commands:
    """Hosts of a node that will go soon leave at the next step, with nothing lost, and none is started there."""
    known.looks -= 1
    if ours := ({host.node for host in known.hosts.values()} & seen.draining) - known.leaving:
        yield Post(Message(f"{count(len(ours), 'node')} will go soon; the workers there leave first."))
        if not known.members:
            yield from commit_newest(known)
    known.leaving, known.dead = seen.draining, seen.dead
    yield from _judge_failed_starts(known, seen.asked)


def commit_newest(known: Known) -> Commands:
    """Let the newest state that a host in no membership holds be written, unless it is."""
    if holder := known.newest():
        yield Commit(holder.name)


def _judge_failed_starts(known: Known, asked: float) -> Commands:
    """Leave a node out, or its spares for now, after too many failures in a row; on a node that goes none counts."""
    limit = known.scaling.max_failures
    due = [failed for failed in known.failed_starts if failed.at <= asked]
    known.failed_starts = [failed for failed in known.failed_starts if failed.at > asked]
    for failed in due:
        vacancy = known.vacancy(failed.node, failed.spare)
        if failed.node in known.leaving | known.dead:
            vacancy.failures = 0
        elif not 0 <= limit < failed.failures:
            continue
        elif failed.spare:
            vacancy.retry_at = failed.at + RETRY_SECONDS
            if failed.failures == limit + 1:
                yield Post(Message(f"No spare can start on node {failed.node[:6]} for now: {failed.reason}."))
        else:
            known.left_out[failed.node] = failed.reason
            yield Post(Message(f"No worker can start on node {failed.node[:6]}, which is left out: {failed.reason}."))


def wanted(known: Known) -> list[HostRecord]:
    """The hosts that should train: for every seat a ready one that answers, on a node that stays."""
    members, chosen = set(known.members), dict[HostRecord, None]()
    usable = known.by_node(
        host for host in known.hosts.values()
        if host.ready and host.ending is None and (host in members or (not host.busy and known.answers(host)))
    )  # fmt: skip
    for (node, gpus), number in known.places().items():
        if node in known.leaving:
            continue
        fitting = [host for host in usable[node] if host.gpus in (None, gpus) and host not in chosen]
        # Those that train go on; then those bound to these GPUs; spares last.
        fitting.sort(key=lambda host: (host not in members, host.gpus is None))
        chosen |= dict.fromkeys(fitting[:number])
    return list(chosen)


def bind_gpus(known: Known, hosts: list[HostRecord]) -> None:
    """Give each of these hosts that has no GPUs yet those of a seat on its node that none of the others has."""
    taken = {(host.node, host.gpus) for host in hosts if host.gpus}
    free: dict[str, list[tuple[str, ...]]] = {}
    for node, gpus in known.places():
        if (node, gpus) not in taken:
            free.setdefault(node, []).append(gpus)
    for host in hosts:
        if host.gpus is None:
            here = free.get(host.node, [])
            host.gpus = here[0] if here else ()
            if host.gpus:
                here.pop(0)
                assert host.info is not None, "a host that is bound is ready"
                host.predecessor = known.tenants.get(host.place)
                known.tenants[host.place] = host.info.pid, host.info.started


def hopeless(known: Known) -> str:
    """Why there will never be enough hosts on the nodes that are there; empty if there may be."""
    alive = Counter(host.node for host in known.alive())
    seats = known.seats_by_node()
    possible = sum(min(number, alive[node]) if node in known.left_out else number for node, number in seats.items())
    reasons = [known.left_out[node] for node in seats if node in known.left_out]
    return reasons[0] if reasons and possible < known.enough else ""
