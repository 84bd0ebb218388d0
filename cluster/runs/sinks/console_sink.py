"""The console as a sink: the live line, messages, and who the workers are."""

from collections import Counter
from collections.abc import Sequence

from cluster.elastic.events import Event, MembershipFormed, Message
from cluster.runs.console import Console
from cluster.runs.journal import Entry, Journal
from cluster.runs.sinks.sink import Sink
from cluster.workloads.training_events import Evaluated, MemberStarted, StepMade
from doge.common.words import count


class ConsoleSink(Sink):
    """Shows the events of this driver, each once."""

    name = "console"
    close_seconds = 5.0

    def __init__(self, console: Console):
        self._console = console
        self._next = 0  # number of the next event to show
        self._membership: MembershipFormed | None = None
        self._started: dict[int, MemberStarted] = {}  # its members, by rank

    def position(self, journal: Journal) -> int:
        return journal.start

    def saved(self, journal: Journal, position: int) -> int:
        return position

    def handle(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.number >= self._next:
                self._next = entry.number + 1
                self._show(entry.event)

    def _show(self, event: Event) -> None:
        match event:
            case StepMade():
                self._console.step(event.step, event.metrics)
            case Evaluated():
                self._console.say(f"step {event.step:,}  held-out loss {event.metrics['held_out_loss']:.4f}")
            case Message():
                self._console.say(event.text)
            case MembershipFormed():
                self._membership, self._started = event, {}
            case MemberStarted() if self._membership and event.membership == self._membership.number:
                self._started[event.rank] = event
                if len(self._started) == self._membership.world_size:
                    members = [self._started[rank] for rank in range(len(self._started))]
                    self._console.say(f"{describe_membership(self._membership, members)}.")


def describe_membership(membership: MembershipFormed, members: Sequence[MemberStarted]) -> str:
    """Describe the members, ordered by rank, their first step and, after an interruption, how long it took."""
    counted = Counter(member.device for member in members)
    devices = ", ".join(f"{number} × {device}" if number > 1 else device for device, number in counted.items())
    first = members[0]
    text = f"{count(len(members), 'worker')} on {devices}, {first.precision}"
    if len(members) > 1:
        text += f", sharing {' + '.join(str(member.share) for member in members)} sequences a step"
    text += f", from step {first.step:,}"
    if repeated := membership.reached - first.step:
        text += f", repeating {count(repeated, 'step')}"
    if membership.lost_s is not None:
        parts = {"regrouping": membership.lost_s + membership.formed_s}
        parts |= {name: max(member.seconds[name] for member in members) for name in first.seconds}
        text += f", {sum(parts.values()):.1f} s after the last ("
        text += ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items()) + ")"
    return text
