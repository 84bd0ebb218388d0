"""The documentation is true: its example runs and learns, and the files that it names are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/performance.md")
FOLDERS = "benchmarks|cluster|data_pipelines|docs|doge|jobs|tests"


@pytest.mark.slow
def test_one_process_trains_without_ray():
    script = "import sys, runpy; runpy.run_path(sys.argv[1], run_name='__main__'); assert 'ray' not in sys.modules"
    command = [sys.executable, "-c", script, "docs/examples/one_process.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page):
    text = (ROOT / page).read_text()
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text)
    linked = [str(Path(page).parent / link) for link in re.findall(r"\]\((?!http)([^)#]+)\)", text)]
    missing = [name for name in [*named, *linked] if not (ROOT / name).exists()]
    assert named + linked
    assert not missing, f"{page} names files that are not there: {missing}"
