"""Chaos: kill, pause and throttle the workers of a run under way, to see that the training does not notice.

    python -m cluster.chaos --every 30 --duration 600
    python -m cluster.chaos --run tiny --seed 7 --kinds kill-worker kill-worker pause
    python -m cluster.chaos --at 30 kill-worker 60 kill-node 90 throttle
    python -m cluster.chaos --every 30 --seed 7 --dry-run

It finds the only run of the cluster by itself. Each event is a line: the seconds since the start, what, and whom. The
times between events are exponentially distributed; the same seed gives the same events. A kind that is named twice
comes twice as often. Whatever ends this command, no worker stays stopped.
"""

import itertools
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import tyro

from cluster.chaos.chaos import Chaos, RunOver
from cluster.chaos.disturbances import Disturbance, Kind, schedule
from cluster.chaos.throttle import check_hold
from doge.common.errors import UserError
from doge.common.words import listed


@dataclass(frozen=True)
class Settings:
    """Options of `python -m cluster.chaos`.

    Args:
        run: name of the run; by default the only one under way in the cluster.
        address: of the Ray cluster; by default that of this machine.
        seed: of the events and their victims; by default a new one, which is printed.
        every: seconds from one event to the next, in the mean of an exponential distribution.
        duration: seconds in which events begin; by default until the run ends.
        kinds: what may happen; one that is named twice comes twice as often.
        at: these events instead, each as its seconds since the start and its kind.
        pause_seconds: that a paused worker is stopped.
        throttle_share: of its time that a throttled worker gets.
        throttle_seconds: that a worker is throttled.
        spares: choose hosts that only wait, too.
        dry_run: print the events and do nothing.
    """

    run: str | None = None
    address: str | None = None
    seed: int | None = None
    every: float = 60.0
    duration: float | None = None
    kinds: tuple[Kind, ...] = get_args(Kind)
    at: tuple[tuple[float, Kind], ...] = ()
    pause_seconds: float = 5.0
    throttle_share: float = 1 / 3
    throttle_seconds: float = 20.0
    spares: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def __post_init__(self):
        for name in ("every", "duration", "pause_seconds", "throttle_seconds", "throttle_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}.")
        check_hold(self.throttle_share, self.throttle_seconds)
        if not self.kinds:
            raise UserError(f"--kinds needs at least one of {listed(list(get_args(Kind)))}.")
        if any(not 0 <= at < math.inf for at, _ in self.at):
            raise UserError("--at takes seconds since the start, which are not negative.")

    def events(self, seed: int) -> Iterator[Disturbance]:
        duration = self.duration or math.inf
        if self.at:
            return (
                Disturbance(number, *event) for number, event in enumerate(sorted(self.at), 1) if event[0] < duration
            )
        return schedule(seed, self.every, self.kinds, duration)


def disturb(settings: Settings, say: Callable[[Any], None] = print) -> None:
    """Do what the settings say, a line of ``say`` for each event. Raises UserError."""
    seed = secrets.randbelow(2**32) if settings.seed is None else settings.seed
    say(f"Seed {seed}")
    events = settings.events(seed)
    if settings.dry_run:
        for event in itertools.islice(events, 30):
            say(event)
        if next(events, None):
            say("     … and so on")
        return
    with Chaos(settings.run, settings.address, seed, settings.spares) as chaos:
        say(f"Disturbing the run {chaos.run}")
        start = time.monotonic()
        try:
            for event in events:
                chaos.sleep(start + event.at)
                try:
                    done: object = chaos.act(
                        event, settings.pause_seconds, settings.throttle_share, settings.throttle_seconds
                    )
                except RunOver:
                    raise
                except UserError as reason:
                    done = f"{event.kind:<11}  skipped: {reason}"
                say(f"{time.monotonic() - start:8.1f} s  {done}")
            chaos.sleep_while_held()
        except RunOver as over:
            say(over)


def main() -> None:
    """The command: 0 done or the run is over, 1 a sentence on standard error, 130 interrupted."""
    from doge.common.config_tree import parse

    try:
        settings = parse(Settings, Settings(), sys.argv[1:], __doc__, "python -m cluster.chaos")
        disturb(settings, lambda line: print(line, flush=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted: all workers run freely.", file=sys.stderr)
        sys.exit(130)
