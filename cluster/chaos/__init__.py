"""Chaos as a tool: `python -m cluster.chaos`, or from Python `with Chaos() as chaos: chaos.kill_worker(rank=0)`."""

from cluster.chaos.chaos import Chaos, Nobody, RunOver

__all__ = ["Chaos", "Nobody", "RunOver"]
