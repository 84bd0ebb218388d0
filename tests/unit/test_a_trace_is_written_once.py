import gzip
import json

import torch

from doge.common.storage import Storage
from doge.reporting.tracing import StepTrace


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
    for steps, made in ((0, 8), (3, 1), (3, 5)):
        trace = StepTrace(0, steps, Storage(str(tmp_path)), print)
        for _ in range(made):
            trace.step()
        trace.close()
        assert not trace.written
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_is_said_and_ends_nothing(tmp_path):
    said = []
    (tmp_path / "file").write_text("")
    trace = StepTrace(0, 1, Storage(str(tmp_path / "file" / "folder")), said.append)
    for _ in range(8):
        trace.step()
    trace.close()
    assert len(said) == 1
    assert said[0].startswith("The steps cannot be traced")
