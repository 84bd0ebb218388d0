"""Everything durable goes through one root: a directory or any URI that fsspec opens."""

from doge.common.storage.local_files import commit, sha256
from doge.common.storage.remote_cache import default_cache, private_cache
from doge.common.storage.root import Storage, check_marker, marker_name
from doge.common.storage.sentences import CacheError, StorageError

__all__ = [
    "CacheError",
    "Storage",
    "StorageError",
    "check_marker",
    "commit",
    "default_cache",
    "marker_name",
    "private_cache",
    "sha256",
]
