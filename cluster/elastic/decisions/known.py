"""All that the coordinator knows, as plain data, and what follows from it without a decision."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cluster.elastic.decisions.observations import Offered
from cluster.elastic.membership import HostInfo, Membership, Outcome, Process, Seat, StateId
from cluster.elastic.workload import Beat
from cluster.machines.scaling import ScalingRecipe

WATCH_SECONDS = 0.5  # between two looks at nodes and hosts
ANSWER_SECONDS = 3.0  # a host that does not answer for so long is left out of a new membership

NOTHING = StateId(-1)

Place = tuple[str, tuple[str, ...]]  # a node and the GPUs of a seat there


@dataclass(eq=False)
class HostRecord:
    """What is known of a host. Times are seconds of the coordinator's monotonic clock.

    Args:
        spare: whether the host was started to wait.
        started: when it was asked for.
        answered: when it last answered anything, or was started.
        replaces: whether it was started for one that was lost.
        gpus: ids of the GPUs that it is bound to; None before it is bound to any.
        predecessor: the process that was bound to them before.
        info: what it said when it was ready.
        beat: the last one heard.
        moved: when its progress or its activity last changed, as far as its beats tell.
        longest: seconds between two changes within a step of its present membership, the longest so far.
        asked: whether it owes an answer to the question for its beat; no second one is asked meanwhile.
        busy: whether it owes an offer or an outcome, so that nothing else of its kind can be asked.
        used: whether it was in a membership.
        ending: since when it writes what is left to be written, to be ended then.
        given_up: when it was last silent after its membership had ended without it; None if it owes no outcome.
        victim: whether it was killed since it waited for another one, and could not be woken.
        lost: whether its process is gone, or was killed.
        reason: why it was lost; empty if nobody needed it any more.
    """

    name: str
    node: str
    spare: bool
    started: float
    answered: float
    replaces: bool = False
    gpus: tuple[str, ...] | None = None
    predecessor: Process | None = None
    info: HostInfo | None = None
    beat: Beat = field(default_factory=lambda: Beat(waiting=True))
    moved: float = 0.0
    longest: float = 0.0
    asked: bool = False
    busy: bool = False
    used: bool = False
    ending: float | None = None
    given_up: float | None = None
    victim: bool = False
    lost: bool = False
    reason: str = ""

    @property
    def ready(self) -> bool:
        return self.info is not None and not self.lost

    @property
    def place(self) -> Place:
        return self.node, self.gpus or ()


@dataclass
class Vacancy:
    """Failed starts of hosts for the seats of one node, or of spares there: memory may be short for these alone.

    Args:
        failures: attempts in a row that failed.
        failed_at: the last of them; a host that was started before belongs to that attempt.
        retry_at: no host is started before.
    """

    failures: int = 0
    failed_at: float = float("-inf")
    retry_at: float = float("-inf")


@dataclass
class Trouble:
    """Memberships in a row that the hosts at one place broke by themselves, without a new step.

    Args:
        until: no host trains there before.
        reason: of the last of them.
    """

    failures: int = 0
    until: float = float("-inf")
    reason: str = ""


@dataclass(frozen=True)
class FailedStart:
    """A failed attempt that waits for news of its node: on one that is gone it does not count.

    Args:
        failures: attempts in a row that failed, this one included.
    """

    node: str
    spare: bool
    failures: int
    reason: str
    at: float


@dataclass(frozen=True)
class Gathering:
    """Phase: there are not enough hosts for a membership."""


@dataclass
class Questioning:
    """Phase: each host must answer before it is counted on; a neighbour of one that died may not be missed yet.

    Args:
        unheard: hosts that have not answered since.
    """

    hosts: list[HostRecord]
    unheard: set[HostRecord]
    since: float


@dataclass
class Forming:
    """Phase: the source offers its state, then the first host says where it listens.

    Args:
        hosts: in the order of their ranks.
        source: host that has the state to start from; one that is about to go is not among ``hosts``.
    """

    hosts: list[HostRecord]
    source: HostRecord
    since: float
    offer: Offered | None = None
    address: tuple[str, int] | None = None


@dataclass
class Running:
    """Phase: a membership steps.

    Args:
        members: in the order of their ranks.
        first: steps that were made in the state that it started from.
        formed_at: when it began.
        pending: members that have neither ended it nor are lost.
        at_work: whether all members have taken up the state.
        asked_at: when the members were asked to end it; None before.
        ended_at: when a member was lost or failed; None while it is whole.
        committed: the state that a member was told to commit after it had ended a hurried membership.
        stalled: whether it was ended since nothing moved in it.
        hurried: whether it was ended at once, since somebody has to go and no step would end in time.
        aborted: whether those that had not noticed were told.
    """

    membership: Membership
    members: list[HostRecord]
    first: int
    pending: list[HostRecord]
    formed_at: float = 0.0
    outcomes: dict[HostRecord, Outcome] = field(default_factory=dict)
    at_work: bool = False
    asked_at: float | None = None
    ended_at: float | None = None
    committed: StateId = NOTHING
    stalled: bool = False
    hurried: bool = False
    aborted: bool = False


@dataclass(frozen=True)
class Pausing:
    """Phase: forming a membership failed and is tried again later."""

    until: float


@dataclass(frozen=True)
class Over:
    """Phase: the run is finished or stopped."""


Phase = Gathering | Questioning | Forming | Running | Pausing | Over


@dataclass
class Known:
    """All that the coordinator knows; only `decide` changes it.

    Args:
        scaling: how many hosts there may be, and how patient to be.
        now: time of the latest observation, in seconds of the coordinator's monotonic clock.
        ticked: time of the latest tick before this observation.
        groups: seats by rank of the worker groups that are not complete yet, and of the one that counts.
        seats: where hosts may train.
        hosts: all that live, and those of the present membership that were lost, by name.
        names: hosts that were ever started.
        leaving: nodes that are about to go.
        dead: nodes that Ray knows to be gone.
        looks: looks at the nodes that are under way.
        vacancies: failed starts by node and whether of a spare.
        failed_starts: failures that wait for news of their node.
        left_out: nodes on which no host can be started, and why.
        tenants: the processes that were bound last to the GPUs of the seats.
        troubles: of places whose hosts broke memberships.
        to_replace: hosts that were lost and in whose place none was started yet.
        number: of the latest membership.
        reached: the most steps that any membership has made.
        failures: memberships in a row that failed without a new step.
        holder: the last rank 0; of equally new states, its own.
        lost_at: when the last membership broke; None once another was formed.
        stopped: whether the run must end, once what its hosts hold is committed.
        interrupted: whether its members must leave at once, for the same.
    """

    scaling: ScalingRecipe
    now: float = 0.0
    ticked: float = float("-inf")
    phase: Phase = field(default_factory=Gathering)
    groups: dict[str, dict[int, Seat]] = field(default_factory=dict)
    seats: tuple[Seat, ...] = ()
    hosts: dict[str, HostRecord] = field(default_factory=dict)
    names: int = 0
    leaving: frozenset[str] = frozenset()
    dead: frozenset[str] = frozenset()
    looks: int = 0
    vacancies: dict[tuple[str, bool], Vacancy] = field(default_factory=dict)
    failed_starts: list[FailedStart] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    tenants: dict[Place, Process] = field(default_factory=dict)
    troubles: dict[Place, Trouble] = field(default_factory=dict)
    to_replace: int = 0
    number: int = 0
    reached: int = 0
    failures: int = 0
    holder: HostRecord | None = None
    lost_at: float | None = None
    stopped: bool = False
    interrupted: bool = False

    @property
    def members(self) -> list[HostRecord]:
        """Hosts of the present membership, those included that were lost, in the order of their ranks."""
        return self.phase.members if isinstance(self.phase, Running) else []

    @property
    def enough(self) -> int:
        """Hosts that a membership needs."""
        return max(1, min(self.scaling.min_workers, len(self.seats)))

    def barred(self, place: Place) -> bool:
        """Whether nobody trains at a place for now."""
        return place in self.troubles and self.now < self.troubles[place].until

    def alive(self) -> list[HostRecord]:
        return [host for host in self.hosts.values() if not host.lost]

    def by_node(self, hosts: Iterable[HostRecord]) -> dict[str, list[HostRecord]]:
        """Hosts by their nodes, of which those without any have an empty list."""
        found: dict[str, list[HostRecord]] = defaultdict(list)
        for host in hosts:
            found[host.node].append(host)
        return found

    def starting(self) -> list[HostRecord]:
        return [host for host in self.alive() if host.info is None]

    def answers(self, host: HostRecord) -> bool:
        """Whether the host can be counted on right now."""
        return self.now - host.answered < ANSWER_SECONDS

    def newest(self, preferred: Sequence[HostRecord] = ()) -> HostRecord | None:
        """The host with the newest state, also one that is about to go, the last rank 0 first; None where none is idle.

        Args:
            preferred: of hosts with equal ones.
        """
        idle = [host for host in self.hosts.values() if host.ready and not host.busy and self.answers(host)]
        return max(
            idle, key=lambda host: (host.beat.held or NOTHING, host is self.holder, host in preferred), default=None
        )

    def places(self) -> Counter[Place]:
        """How many seats there are at every place that is not barred."""
        places = Counter((seat.node, seat.gpus) for seat in self.seats)
        return Counter({place: number for place, number in places.items() if not self.barred(place)})

    def misfits(self) -> set[HostRecord]:
        """Hosts that are bound to GPUs of which no seat on their node has any: seats may come back with others."""
        places = {(seat.node, seat.gpus) for seat in self.seats}
        nodes = {node for node, _ in places}
        return {h for h in self.hosts.values() if h.gpus and h.node in nodes and (h.node, h.gpus) not in places}

    def seats_by_node(self) -> Counter[str]:
        seats: Counter[str] = Counter()
        for (node, _), number in self.places().items():
            seats[node] += number
        return seats

    def vacancy(self, node: str, spare: bool) -> Vacancy:
        return self.vacancies.setdefault((node, spare), Vacancy())
