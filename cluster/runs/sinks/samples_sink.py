"""The recorded samples as a sink: which unit was which in every step, as files in the run's directory."""

import json
from collections.abc import Sequence

from cluster.runs.journal import Entry
from cluster.runs.sinks.sink import Sink
from cluster.workloads.training_events import SamplesTaken
from doge.common.storage import Storage


class SamplesSink(Sink):
    """Writes one file a step and share, from a unit's number to where it lies; a repeated step writes the same again.

    Args:
        directory: The run's directory.
    """

    name = "samples"

    def __init__(self, directory: Storage):
        self._directory = directory

    def handle(self, entries: Sequence[Entry]) -> None:
        """Raises StorageError."""
        for event in (entry.event for entry in entries):
            if isinstance(event, SamplesTaken):
                content = {event.first + at: sample for at, sample in enumerate(event.samples)}
                name = f"samples/step-{event.step:08d}-{event.first:012d}.json"
                self._directory.write_bytes(name, json.dumps(content).encode())
