import io

from cluster.runs.console import Console
from doge.common.words import count, duration, listed


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


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]


def test_counts_and_lists_read_like_sentences():
    assert [count(number, "CPU") for number in (0, 1, 2.0, 0.5, 1200)] == [
        "0 CPUs", "1 CPU", "2 CPUs", "0.5 CPUs", "1,200 CPUs"
    ]  # fmt: skip
    assert [listed(words) for words in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]
