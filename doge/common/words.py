"""Counts, lists and durations as messages spell them."""

from collections.abc import Iterable


def count(number: float, noun: str) -> str:
    """A number with its noun: ``1 worker``, ``2 workers``, ``1,200 workers``, ``0.5 CPUs``."""
    return f"{number:,.12g} {noun}{'s' * (number != 1)}"


def listed(words: Iterable[str]) -> str:
    """Words as a sentence lists them: ``a``, ``a and b``, ``a, b and c``."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def duration(seconds: float) -> str:
    """Seconds as a clock shows them: ``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
