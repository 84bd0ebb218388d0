"""What another version of Ray may break without a word."""

import re
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECKED = "2.60"
FILES = {"cluster/machines/nodes.py", "cluster/elastic/seat_trainer.py"}
PRIVATE = re.compile(r"\bray\._|\bray\.\S*\._internal|\._actor_id|from ray\._|import ray\._")


def test_private_interfaces_of_ray_stand_in_two_files():
    rooms = ("doge", "data_pipelines", "cluster", "tune", "jobs")
    paths = (path for room in rooms for path in (ROOT / room).rglob("*.py"))
    assert {str(path.relative_to(ROOT)) for path in paths if PRIVATE.search(path.read_text())} == FILES


def test_they_were_checked_with_this_version_of_ray():
    """With another one, let tests/cluster/test_seats_follow_the_nodes.py pass first, then change the number here."""
    assert version("ray").startswith(f"{CHECKED}.")
    for file in FILES:
        assert f"checked with Ray {CHECKED}." in (ROOT / file).read_text()
