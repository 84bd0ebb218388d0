"""Input files: the files of a source, and the identity that each has by its content."""

import fnmatch
import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from data_pipelines.sources import embedded
from data_pipelines.sources.source_recipe import SourceRecipe
from doge.common.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".txt", ".txt.gz")


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


def list_files(name: str, source: SourceRecipe) -> list[InputFile]:
    """List the files of a source, sorted by path.

    Raises:
        UserError: there is no file, or the place cannot be reached.
    """
    if source.path.startswith(embedded.SCHEME):
        return [InputFile(*file) for file in embedded.list_files(source.path, source.max_bytes)]
    import fsspec

    advice = f"point --data.sources.{name}.path at local files, for example '/data/{name}/*.parquet'"
    try:
        path = _pin_revision(source.path)
        filesystem, root = fsspec.core.url_to_fs(path)
        if not any(wildcard in root for wildcard in "*?["):
            found = filesystem.find(root, detail=True)
        else:
            found = filesystem.glob(root, detail=True)
    except Exception as error:  # each filesystem raises its own kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"The source {name} ({source.path}) cannot be reached ({reason}): {advice}.") from error
    files = [
        InputFile(filesystem.unstrip_protocol(path), info["size"], _identity(filesystem, path, info))
        for path, info in sorted(found.items())
        if info["type"] == "file" and path.endswith(SUFFIXES) and not fnmatch.fnmatch(path, "*/.*")
    ]
    if not files:
        raise UserError(f"The source {name} has no {', '.join(SUFFIXES)} file at {source.path}: {advice}.")
    return files


def check_unchanged(file: InputFile, filesystem: "AbstractFileSystem", path: str) -> None:
    """Raise UserError if a file is not what was listed. Passes on the errors of its filesystem."""
    now = filesystem.info(path)
    if now["size"] != file.size or _identity(filesystem, path, now) != file.identity:
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
    return _content_digest(filesystem, path, info["size"], info.get("mtime"))


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
