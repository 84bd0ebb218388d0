"""The catalog: the commit records of a plan's shards."""

import json

from data_pipelines.order.plan import Plan
from data_pipelines.tokenizing.shards import ShardRecord, read_record, shard_name
from doge.common.storage import Storage


class Catalog:
    """Finds the commit records of a plan's shards: ``catalog(source, file, part)`` is a record or None.

    Records never change, so each is read once. The snapshot of all of them that `save` writes spares a reader thousands
    of small reads.

    Args:
        plan: the plan whose shards are looked up.
        storage: holds the shards.
        check_sizes: treat a shard that is missing or has the wrong size as not committed (local storage only).
    """

    def __init__(self, plan: Plan, storage: Storage, check_sizes: bool = False):
        self._plan, self._storage, self._check = plan, storage, check_sizes and storage.is_local
        self._records: dict[tuple[str, int, int], ShardRecord] = {}
        self._snapshot = f"plans/{plan.fingerprint}.shards.json"
        if not self._check:
            self._load_snapshot()

    def __call__(self, source: str, file: int, part: int) -> ShardRecord | None:
        address = (source, file, part)
        if address not in self._records:
            key = self._plan.keys[source][file]
            record = read_record(self._storage, key, part)
            if record is None or (self._check and not self._is_whole(key, part, record)):
                return None
            if record.skipped and not self._plan.recipe.skip_unreadable:
                return None
            self._records[address] = record
        return self._records[address]

    def records(self, source: str) -> dict[tuple[int, int], ShardRecord]:
        """The records of ``source`` that have been looked up so far, by (file, part)."""
        return {address[1:]: record for address, record in self._records.items() if address[0] == source}

    def save(self) -> None:
        """Write the snapshot of the records that have been looked up so far."""
        content = [[*address, *vars(record).values()] for address, record in self._records.items()]
        self._storage.write_bytes(self._snapshot, json.dumps(content).encode())

    def _load_snapshot(self) -> None:
        try:
            content = json.loads(self._storage.read_bytes(self._snapshot))
        except (FileNotFoundError, json.JSONDecodeError):
            return
        for source, file, part, *values in content:
            self._records[source, file, part] = ShardRecord(*values)

    def _is_whole(self, key: str, part: int, record: ShardRecord) -> bool:
        try:
            return self._storage.size(shard_name(key, part)) == record.bytes
        except FileNotFoundError:
            return False
