"""How fast text files become committed shards, against `datasets.map` with the same tokenizer on the same two cores.

    python benchmarks/tokenization.py --megabytes 200 --rounds 3

Ours is the whole preparation: list the files, read, tokenize, pack, write and commit, with Ray Data; Ray is up before.
Theirs reads the text from Arrow (made of the same files before the clock starts), tokenizes with the HF fast tokenizer
in batches in two processes and writes Arrow. The two take turns; the medians are compared. In the first round Ray's
workers still import what they need, and it counts like the others. The ids of all documents of both are then compared.
The text is that of the Python installation, repeated up to the size asked, or JSONL files with a column "text". The
last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

import numpy as np
from machines import end, first_cores

from cluster.machines.head_storage import share
from data_pipelines.order.plan import Plan, make_plan
from data_pipelines.prepare import prepare
from data_pipelines.sources import embedded
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from data_pipelines.tokenizing.shards import open_shard, read_record, shard_name
from doge.common.storage import Storage
from doge.tokenizer.training import TokenizerRecipe, train_tokenizer

CORES = 2
FILES = 16
DISTINCT_BYTES = 12_000_000  # of code and as many of prose, before the text repeats itself


def installation_texts() -> list[str]:
    """Modules of the standard library and the documentation of the installed packages."""
    names = [
        name for kind in ("code", "prose") for name, _, _ in embedded.list_files(embedded.SCHEME + kind, DISTINCT_BYTES)
    ]
    return [row["text"] for name in names for row in embedded.rows(name) if row["text"]]


def given_texts(paths: list[str]) -> list[str]:
    lines = (line for path in paths for line in Path(path).read_text("utf-8").split("\n") if line.strip())
    return [text for line in lines if (text := json.loads(line)["text"])]


def write_files(folder: Path, texts: list[str], size: int) -> int:
    """``size`` bytes of text, repeated if need be, as JSONL files of equal size; the bytes that it came to."""
    written = number = 0
    with ExitStack() as stack:
        streams = [stack.enter_context(open(folder / f"{file:02d}.jsonl", "w")) for file in range(FILES)]
        for text in cycle(texts):
            if written >= size:
                break
            streams[number % FILES].write(json.dumps({"text": text}) + "\n")
            written, number = written + len(text.encode()), number + 1
    return written


def ours(folder: Path, storage: Storage) -> tuple[float, int, Plan]:
    """Seconds, tokens without BOS and EOS, and the plan of one preparation."""
    sources = {"text": SourceRecipe(f"{folder}/text/*.jsonl", 1.0)}
    recipe = DataRecipe(sources, held_out_sequences=0, packing="stream", max_tasks=CORES)
    started = time.perf_counter()
    plan = make_plan(recipe, TokenizerRecipe(str(folder / "tokenizer")), storage)
    progress = prepare(plan, storage)
    seconds = time.perf_counter() - started
    return seconds, progress.tokens - 2 * progress.documents, plan


def our_stream(plan: Plan, storage: Storage) -> np.ndarray:
    """The tokens of all documents in the order of the files' names."""
    pieces = []
    for file, key in sorted(zip(plan.files["text"], plan.keys["text"], strict=True)):
        part, last = 0, False
        while not last:
            record = read_record(storage, key, part)
            if record is None:
                raise RuntimeError(f"Part {part} of {file.path} was not prepared.")
            shard = open_shard(storage.local(shard_name(key, part)), record)
            pieces.append(shard.tokens.ravel()[: shard.lengths.sum()])
            part, last = part + 1, record.last
    return np.concatenate(pieces)


class Theirs:
    """`datasets` in a process of its own, which has imported everything and loaded the text before it is timed."""

    def __init__(self, folder: Path):
        command = [sys.executable, __file__, "--theirs", str(folder)]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self._answer()

    def run(self) -> tuple[float, int]:
        """Seconds and tokens of one `map`."""
        print("go", file=self._process.stdin, flush=True)
        return tuple(self._answer())

    def _answer(self):
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("The process that runs datasets has failed.")
        return json.loads(line)

    def close(self) -> None:
        end(self._process)


def serve_theirs(folder: Path) -> None:
    """Run `map` anew for every line of the standard input; leaves ids.npy and lengths.npy of the last one."""
    import datasets

    from doge.tokenizer.loading import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    files = [str(path) for path in sorted((folder / "text").glob("*.jsonl"))]
    texts = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(folder / "datasets"))

    def encode(batch: dict) -> dict:
        # what looks like a special token is text
        ids = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
        return {"input_ids": ids["input_ids"]}

    print(json.dumps("ready"), flush=True)
    for number, _ in enumerate(sys.stdin):
        out = folder / f"mapped-{number}"
        out.mkdir()
        started = time.perf_counter()
        mapped = texts.map(
            encode, batched=True, num_proc=CORES, remove_columns=texts.column_names, load_from_cache_file=False,
            cache_file_name=str(out / "ids.arrow"),
        )  # fmt: skip
        seconds = time.perf_counter() - started
        chunks = [chunk for chunk in mapped.data.column("input_ids").chunks if len(chunk)]
        ids = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
        np.save(folder / "ids.npy", ids)
        np.save(folder / "lengths.npy", np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks]))
        del mapped, chunks
        shutil.rmtree(out)
        print(json.dumps([seconds, len(ids)]), flush=True)


def equal(stream: np.ndarray, ids: np.ndarray, lengths: np.ndarray, bos: int, eos: int) -> bool:
    """Whether a stream holds these documents, each between BOS and EOS."""
    starts, ends = np.flatnonzero(stream == bos), np.flatnonzero(stream == eos)
    if not (len(starts) == len(ends) == len(lengths) and np.array_equal(ends - starts - 1, lengths)):
        return False
    return np.array_equal(stream[(stream != bos) & (stream != eos)], ids)


def rounds(folder: Path, count: int) -> Iterator[tuple[float, int, float, int, Plan, Storage]]:
    theirs = Theirs(folder)
    try:
        for number in range(count):
            storage = share(Storage(str(folder / f"storage-{number}")))
            our_seconds, our_tokens, plan = ours(folder, storage)
            their_seconds, their_tokens = theirs.run()
            yield our_seconds, our_tokens, their_seconds, their_tokens, plan, storage
            shutil.rmtree(storage.root)
    finally:
        theirs.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200, help="of text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each side, by turns (default: %(default)s)")
    parser.add_argument("--text", nargs="+", metavar="JSONL", help="files to take the text from")
    parser.add_argument("--theirs", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        serve_theirs(Path(args.theirs))
        return

    os.sched_setaffinity(0, first_cores(CORES))  # and all that this process starts
    os.environ.update(RAY_worker_niceness="0")  # by default they give way to all else, the other side too
    import ray

    with tempfile.TemporaryDirectory(prefix="doge-", dir="/tmp", ignore_cleanup_errors=True) as name:  # short paths
        folder = Path(name)
        (folder / "text").mkdir()
        texts = given_texts(args.text) if args.text else installation_texts()
        size = write_files(folder / "text", texts, int(args.megabytes * 1e6))
        tokenizer = train_tokenizer(texts[:: max(1, len(texts) // 2000)])
        tokenizer.save_pretrained(folder / "tokenizer")
        ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, _temp_dir=f"{folder}/ray")
        try:
            seconds: dict[str, list[float]] = {"ours": [], "datasets": []}
            all_equal = True
            for number, (ours_s, ours_n, theirs_s, theirs_n, plan, storage) in enumerate(rounds(folder, args.rounds)):
                seconds["ours"].append(ours_s)
                seconds["datasets"].append(theirs_s)
                print(
                    f"round {number + 1}: ours {ours_s:.2f} s, datasets {theirs_s:.2f} s, {theirs_n:,} tokens of "
                    f"{size / 1e6:.0f} MB",
                    flush=True,
                )
                ids, lengths = np.load(folder / "ids.npy"), np.load(folder / "lengths.npy")
                special = tokenizer.bos_token_id, tokenizer.eos_token_id
                all_equal &= ours_n == theirs_n and equal(our_stream(plan, storage), ids, lengths, *special)
        finally:
            ray.shutdown()

    median = {side: statistics.median(found) for side, found in seconds.items()}
    print(f"{'':10}{'seconds':>10}{'tokens/s':>14}")
    for side, found in median.items():
        print(f"{side:10}{found:>10.2f}{theirs_n / found:>14,.0f}")
    result = {
        "tokens_per_s_ours": round(theirs_n / median["ours"]),
        "tokens_per_s_datasets": round(theirs_n / median["datasets"]),
        "ratio": round(median["datasets"] / median["ours"], 2),
        "ids_equal": bool(all_equal),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
