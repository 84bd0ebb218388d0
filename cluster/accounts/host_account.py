"""What the ledger keeps of one host, or of several that were on one machine one after another."""

from dataclasses import dataclass, field


@dataclass
class HostAccount:
    """The account of one host; times in seconds since the run began.

    Args:
        joined: when it was asked for.
        booked: its time until here is in ``seconds``.
        left: when it was gone, None while it is there.
        membership: place of the one in which it stepped last, None before its first step.
        present: seconds of earlier stays, and of the hosts whose accounts it took over.
        later: name of the last of those hosts.
        taken_over: how many they are.
    """

    node: str
    device: str
    joined: float
    booked: float
    left: float | None = None
    membership: int | None = None
    present: float = 0.0
    sequences: int = 0
    joules: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    later: str = ""
    taken_over: int = 0

    def names(self, own: str) -> tuple[str, ...]:
        """Its own name and those of the hosts that it took over, of many the last alone."""
        return (own, *(["…"] if self.taken_over > 1 else []), self.later) if self.taken_over else (own,)

    def take_over(self, name: str, other: "HostAccount") -> None:
        """Add the account of a host that has left and whose time is booked until then."""
        self.present += other.present + other.booked - other.joined
        self.sequences += other.sequences
        if other.joules is not None:
            self.joules = (self.joules or 0.0) + other.joules
        for kind, seconds in other.seconds.items():
            self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
        self.later, self.taken_over = other.later or name, self.taken_over + 1 + other.taken_over
