import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.runs import console as console_module
from cluster.runs.console import Console
from doge.common.terminal import printable
from doge.common.words import count, duration, listed

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(console: Console, last: int) -> None:
    for step in range(1, last + 1):
        console.step(step, {"loss": 2.0, "tokens_per_s": 1000.0, "learning_rate": 1e-3})


def test_a_log_gets_a_line_every_logging_steps():
    output = io.StringIO()
    console = Console(max_steps=25, logging_steps=10, output=output)
    steps(console, 25)
    console.close()
    lines = output.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["10/25", "20/25", "25/25"]
    assert "\x1b" not in output.getvalue()
    assert "loss 2.0000  1,000 tokens/s" in lines[0]
    assert lines[-1].endswith("0:00 to go")


def test_a_terminal_gets_one_line_that_is_redrawn_below_what_stays():
    output = Terminal()
    console = Console(max_steps=25, logging_steps=10, output=output)
    steps(console, 3)
    console.say("held-out loss 1.5")
    console.close()
    shown = output.getvalue().split("\n")
    assert len(shown) == 3  # what was said, the live line, and nothing after it
    assert shown[0].endswith("\r\x1b[2Kheld-out loss 1.5")
    assert shown[1].startswith("step 3/25")


def test_a_terminal_that_can_only_print_is_a_log(monkeypatch):
    for kind in ("dumb", None):
        monkeypatch.delenv("TERM") if kind is None else monkeypatch.setenv("TERM", kind)
        output = Terminal()
        steps(Console(max_steps=25, logging_steps=10, output=output), 25)
        assert "\x1b" not in output.getvalue()
        assert len(output.getvalue().splitlines()) == 3


@pytest.mark.parametrize(("columns", "most"), [("40", 39), ("0", 1000), ("1", 1000)])
def test_a_live_line_takes_one_row(columns, most, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    output = Terminal()
    steps(Console(max_steps=25, logging_steps=10, output=output), 1)
    assert output.getvalue().startswith("step 1/25")
    assert len(output.getvalue()) <= most


def test_progress_is_redrawn_on_a_terminal_and_rare_in_a_log(monkeypatch):
    shown, logged = Terminal(), io.StringIO()
    for output in (shown, logged):
        console = Console(1, 1, output)
        for number in range(3):
            console.progress(f"{number} files")
        console.conclude("3 files")
    assert shown.getvalue().split("\r\x1b[2K") == ["0 files", "1 files", "2 files", "3 files\n"]
    assert logged.getvalue() == "3 files\n"
    monkeypatch.setattr(console_module, "LOG_SECONDS", -1.0)
    console.progress("4 files")
    assert logged.getvalue() == "3 files\n4 files\n"


def test_an_output_that_is_gone_ends_nothing():
    closed = io.StringIO()
    closed.close()

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    for output in (closed, Full()):
        console = Console.__new__(Console)
        Console.__init__(console, 25, 10, io.StringIO())
        console._output = output
        steps(console, 25)
        console.close()


def test_letters_that_an_encoding_lacks_are_replaced():
    text = "200 × 4 … → é日 ─│╭ \udcff"
    assert printable(text, "ascii") == r"200 x 4 ... -> \xe9\u65e5 -|+ \udcff"
    assert printable(text, "utf-8") == text.replace("\udcff", r"\udcff")
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    Console(1, 1, latin).say(text)
    assert latin.buffer.getvalue().decode("latin-1") == "200 × 4 ... -> é\\u65e5 -|+ \\udcff\n"


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "reader"), [("--dry-run --name é…", "cat"), ("--help", "true")])
def test_a_command_prints_in_any_encoding_and_to_nobody(arguments, reader, tmp_path):
    environment = os.environ | {"LANG": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "0", "TERM": "dumb"}
    command = f"{sys.executable} jobs/pretrain.py --storage {tmp_path} {arguments} | {reader}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert b"Traceback" not in result.stderr
    assert b"Exception ignored" not in result.stderr


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]


def test_counts_and_lists_read_like_sentences():
    assert [count(number, "CPU") for number in (0, 1, 2.0, 0.5, 1200)] == [
        "0 CPUs", "1 CPU", "2 CPUs", "0.5 CPUs", "1,200 CPUs"
    ]  # fmt: skip
    assert [listed(words) for words in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]
