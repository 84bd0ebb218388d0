"""Input files: the files of a source, and the identity that each has by its content."""

import hashlib
import logging
import os
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from data_pipelines.sources import embedded
from data_pipelines.sources.places import Found, find, uri
from data_pipelines.sources.source_recipe import SourceRecipe
from doge.common.errors import UserError
from doge.common.paths import plain_path
from doge.common.words import listed

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

LAYOUTS = ".parquet, .jsonl, .json or .txt (the last three also with .gz, .bz2, .xz or .zst)"
_LAYOUT = re.compile(r"(?:(\.parquet)|(\.jsonl|\.json|\.txt)(\.gz|\.bz2|\.xz|\.zst)?)\Z", re.IGNORECASE)
_EXAMPLES = 3  # names of what is left out for each reason

_log = logging.getLogger(__name__)


class InputFile(NamedTuple):
    """One file of a source.

    Attributes:
        path: path or URI.
        size: bytes; 0 for a virtual file.
        identity: changes with the content of the file and with nothing else.
    """

    path: str
    size: int
    identity: str


def layout(path: str) -> tuple[str, str] | None:
    """The ending of a path in lower case and that of its compression, such as (".jsonl", ".gz"); None for any other."""
    found = _LAYOUT.search(path)
    return ((found[1] or found[2]).lower(), (found[3] or "").lower()) if found else None


def list_files(name: str, source: SourceRecipe) -> list[InputFile]:
    """List the files of a source, sorted by path, and log in one sentence what is left out there.

    Raises:
        UserError: there is no file, or the place cannot be reached.
    """
    if source.path.startswith(embedded.SCHEME):
        return [InputFile(*file) for file in embedded.list_files(source.path, source.max_bytes)]
    advice = f"point --data.sources.{name}.path at local files, for example '/data/{name}/*.parquet'"
    try:
        path = source.path if os.path.lexists(source.path) else plain_path(source.path)
        place = "::".join(_pin_revision(link) for link in path.split("::"))
        found = find(place)
        files = [
            InputFile(uri(place, found.filesystem, path), info["size"] or 0, _identity(found.filesystem, path, info))
            for path, info in found.files.items()
            if layout(path)
        ]
    except UserError:
        raise
    except Exception as error:  # each filesystem raises its own kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"The source {name} ({source.path}) cannot be reached ({reason}): {advice}.") from error
    left_out = _left_out(found)
    if not files:
        rest = f", only {left_out}" if left_out else ""
        raise UserError(f"The source {name} has no file at {source.path} that ends in {LAYOUTS}{rest}: {advice}.")
    if left_out:
        _log.warning("The source %s (%s) leaves out %s.", name, source.path, left_out)
    return files


def _left_out(found: Found) -> str:
    """Count what is at a place and not read, with examples of each kind; "" if all is read."""
    kinds = {"with another ending": [path for path in found.files if not layout(path)], **found.left_out}
    phrases = []
    for kind, paths in kinds.items():
        if paths:
            names = [path.rsplit("/", 1)[-1] for path in paths[:_EXAMPLES]]
            phrases.append(f"{len(paths):,} {kind} ({', '.join(names)}{', …' if len(paths) > _EXAMPLES else ''})")
    return listed(phrases) if phrases else ""


def check_unchanged(file: InputFile, filesystem: "AbstractFileSystem", path: str) -> None:
    """Raise UserError if a file is not what was listed. Passes on the errors of its filesystem."""
    now = filesystem.info(path)
    if (now["size"] or 0) != file.size or _identity(filesystem, path, now) != file.identity:
        raise UserError(f"{file.path} changed while it was being prepared: run the same command to prepare it anew.")


def _pin_revision(path: str) -> str:
    """Write today's commit into a hub path, so that the inputs do not change during a run."""
    if not path.startswith("hf://"):
        return path
    from huggingface_hub import HfApi, HfFileSystem

    resolved: Any = HfFileSystem().resolve_path(path)
    if not hasattr(resolved, "repo_id"):  # a bucket has no commits
        return path
    commit = HfApi().repo_info(resolved.repo_id, repo_type=resolved.repo_type, revision=resolved.revision).sha
    return f"hf://{resolved.repo_type}s/{resolved.repo_id}@{commit}/{resolved.path_in_repo}"


_WHOLE, _BLOCK, _BLOCKS = 64 << 20, 1 << 20, 16


def _identity(filesystem: "AbstractFileSystem", path: str, info: dict[str, Any]) -> str:
    """Hash of a file's content; its place and time do not count, so that moving or touching it remakes nothing.

    A store's own content hash is taken where there is one. Otherwise it is the sha256 of the size and the content, of a
    file above 64 MiB only of 16 blocks of 1 MiB spread over it. That misses only an edit which keeps the file's length
    and lies between the blocks; a parquet file's last block describes all the others.
    """
    lfs = info.get("lfs") or {}
    for value in (lfs.get("sha256"), info.get("blob_id"), info.get("ETag"), info.get("etag"), info.get("md5Hash")):
        if value:
            return str(value).strip('"')
    return _content_digest(filesystem, path, info["size"] or 0, info.get("mtime", info.get("created")))


@lru_cache(maxsize=1024)
def _content_digest(filesystem: "AbstractFileSystem", path: str, size: int, modified: float | None) -> str:
    """Sha256 of the content; cached by the time of modification too, since each part of a file asks again."""
    digest = hashlib.sha256(str(size).encode())
    with filesystem.open(path, "rb") as stream:
        if size <= _WHOLE:
            while block := stream.read(_BLOCK):
                digest.update(block)
        else:
            for block in range(_BLOCKS):
                stream.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
