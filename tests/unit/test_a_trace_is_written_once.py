import gzip
import json

import torch

from doge.storage import Storage
from doge.tracing import StepTrace


def test_the_steps_asked_for_are_in_the_trace(tmp_path):
    said = []
    trace = StepTrace(10, 2, Storage(str(tmp_path)), said.append)
    for _ in range(8):
        torch.ones(4).sin()
        trace.step()
    trace.close()
    (path,) = tmp_path.iterdir()
    assert path.name == "steps-00000014-00000015.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::sin" for event in events) == 2
    assert len(said) == 1
    assert str(path) in said[0]


def test_none_is_written_unasked_or_when_the_run_ends_before(tmp_path):
    for steps, made in ((0, 8), (3, 1)):
        trace = StepTrace(0, steps, Storage(str(tmp_path)), print)
        for _ in range(made):
            trace.step()
        trace.close()
    assert not list(tmp_path.iterdir())
