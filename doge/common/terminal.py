"""Text for terminals and logs of any encoding."""

import codecs
import io
import sys

READABLE = "readable"
"""Name of the error handler: letters that an encoding lacks become similar ones or, where there are none, escapes."""

_SIMILAR = {"…": "...", "×": "x", "→": "->", "–": "-", "—": "-", "─": "-", "│": "|"} | dict.fromkeys("╭╮╰╯", "+")


def printable(text: str, encoding: str | None) -> str:
    """The text in letters that an encoding has; without one it is that of a file that takes everything."""
    return text.encode(encoding or "utf-8", READABLE).decode(encoding or "utf-8")


def prepare_streams() -> None:
    """Let this process's output be printed whatever its encoding is."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=READABLE)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_SIMILAR.get(letter, ascii(letter)[1:-1]) for letter in letters), error.end


codecs.register_error(READABLE, _replace)
