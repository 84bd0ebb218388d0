"""Places as people write them: paths that begin with ``~``, ``file:`` URIs, and URIs of other file systems."""

import os
import re
from urllib.parse import unquote

from doge.common.errors import UserError

_URI = re.compile(r"[a-z][a-z0-9+.:-]*://", re.IGNORECASE)
_ONE_SLASH = re.compile(r"((?!file:|local:)[a-z][a-z0-9+.-]+):/(?!/)", re.IGNORECASE)
_FILE = re.compile(r"(?:file|local):", re.IGNORECASE)
_FILE_WITH_PATH = re.compile(r"(?:file|local):(?://(?:localhost)?|(?!//))([/~].*)", re.IGNORECASE | re.DOTALL)


def plain_path(place: str) -> str:
    """The path that a ``file:`` URI or a path with ``~`` names; any other place is returned as it is.

    Raises:
        UserError: the URI has no absolute path, or ``~`` names a user that there is not; or a slash of ``s3://`` is
            missing.
    """
    if (found := _ONE_SLASH.match(place)) and not os.path.lexists(place):
        raise UserError(f"{place} has one slash after {found[1]}: where two belong: write {found[1]}://…")
    if _FILE.match(place):
        found = _FILE_WITH_PATH.fullmatch(place)
        if found is None:
            raise UserError(f"{place} has no absolute path: write file:///home/me/doge, or the path alone.")
        place = re.sub("^/+", "/", unquote(found[1]))
    if place.startswith("~"):
        place = os.path.expanduser(place)
        if place.startswith("~"):
            raise UserError(f"{place} names a home directory that does not exist: give the path from / on.")
    return place


def is_uri(place: str) -> bool:
    """Whether a place is the URI of another file system than this machine's, or of a server."""
    return _FILE.match(place) is None and _URI.match(place) is not None


def is_relative(place: str) -> bool:
    """Whether which directory a place is depends on the working directory."""
    return not is_uri(place) and not os.path.isabs(plain_path(place))
