"""How fast text files become committed shards, against two others with the same tokenizer on the same two cores.

    python benchmarks/tokenization.py --megabytes 200 --rounds 3
    python benchmarks/tokenization.py --one-file 1000            # one file of so many MB against ten of a tenth

Ours is the whole preparation: list the files, read, tokenize, pack, write and commit, with Ray Data; Ray is up before.
`datasets.map` reads the text from Arrow (made of the same files before the clock starts), tokenizes with the HF fast
tokenizer in batches in two processes and writes Arrow. `encode_batch_fast` of `tokenizers`, the strongest that there is
without gigatoken, has the texts in memory and threads on both cores, and only the encoding is timed. They take turns;
the medians are compared. In the first round Ray's workers still import what they need, and it counts like the others.
The ids of all documents are then compared. No text stands twice: it is that of all modules of the Python installation,
or of JSONL files with a column "text". The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import cycle
from pathlib import Path

import numpy as np
from machines import end, first_cores

from cluster.machines.head_storage import share
from data_pipelines.order.plan import Plan, make_plan
from data_pipelines.prepare import prepare
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from data_pipelines.tokenizing.shards import open_shard, read_record, shard_name
from doge.common.storage import Storage
from doge.tokenizer.training import TokenizerRecipe, train_tokenizer

CORES = 2
FILES = 16
AT_A_TIME = 1000  # texts that `encode_batch_fast` gets


def installation_texts() -> Iterator[str]:
    """The modules of the standard library and of the installed packages."""
    for root in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(root)).rglob("*.py")):
            with suppress(OSError, UnicodeDecodeError):
                yield path.read_text("utf-8")


def given_texts(paths: list[str]) -> Iterator[str]:
    for path in paths:
        with open(path, encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines if line.strip())


def distinct(texts: Iterable[str], size: int) -> list[str]:
    """Each text once, up to ``size`` bytes."""
    found = dict[str, None]()
    for text in texts:
        if size <= 0:
            break
        if text and text not in found:
            found[text] = None
            size -= len(text.encode())
    return list(found)


def write_files(folder: Path, texts: Iterable[str], size: float, files: int) -> int:
    """Up to ``size`` bytes of text as JSONL files of equal size; the bytes that it came to."""
    folder.mkdir(parents=True)
    written = number = 0
    with ExitStack() as stack:
        streams = [stack.enter_context(open(folder / f"{file:02d}.jsonl", "w")) for file in range(files)]
        for text in texts:
            if written >= size:
                break
            streams[number % files].write(json.dumps({"text": text}) + "\n")
            written, number = written + len(text.encode()), number + 1
    return written


def ours(folder: Path, storage: Storage, text: str = "text") -> tuple[float, int, Plan]:
    """Seconds, tokens without BOS and EOS, and the plan of one preparation."""
    sources = {"text": SourceRecipe(f"{folder}/{text}/*.jsonl", 1.0)}
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
    """Another side in a process of its own, which has imported everything and loaded the text before it is timed."""

    def __init__(self, side: str, folder: Path):
        command = [sys.executable, __file__, "--serve", side, str(folder)]
        parallel = "true" if side == "encode_batch_fast" else "false"
        environment = os.environ | {"TOKENIZERS_PARALLELISM": parallel, "HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self._answer()

    def run(self) -> tuple[float, int]:
        """Seconds and tokens of one run."""
        print("go", file=self._process.stdin, flush=True)
        return tuple(self._answer())

    def _answer(self):
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("The process of another side has failed.")
        return json.loads(line)

    def close(self) -> None:
        end(self._process)


def serve_datasets(folder: Path) -> None:
    """Run `map` anew for every line of the standard input; leaves ids and lengths of the last one."""
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
        lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])
        np.savez(folder / "datasets.npz", ids=ids, lengths=lengths)
        del mapped, chunks
        shutil.rmtree(out)
        print(json.dumps([seconds, len(ids)]), flush=True)


def serve_encode_batch_fast(folder: Path) -> None:
    """Encode all texts anew for every line of the standard input; leaves ids and lengths of the last one."""
    from doge.tokenizer.loading import load_tokenizer

    backend = load_tokenizer(str(folder / "tokenizer")).backend_tokenizer
    backend.encode_special_tokens = True  # what looks like a special token is text
    texts = list(given_texts([str(path) for path in sorted((folder / "text").glob("*.jsonl"))]))
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        seconds, found = 0.0, list[np.ndarray]()
        for at in range(0, len(texts), AT_A_TIME):
            started = time.perf_counter()
            encodings = backend.encode_batch_fast(texts[at : at + AT_A_TIME], add_special_tokens=False)
            seconds += time.perf_counter() - started
            found += [np.array(encoding.ids, np.uint32) for encoding in encodings]
        ids = np.concatenate(found)
        np.savez(folder / "encode_batch_fast.npz", ids=ids, lengths=[len(ids) for ids in found])
        print(json.dumps([seconds, len(ids)]), flush=True)


OTHERS = {"datasets": serve_datasets, "encode_batch_fast": serve_encode_batch_fast}


def equal(stream: np.ndarray, ids: np.ndarray, lengths: np.ndarray, bos: int, eos: int) -> bool:
    """Whether a stream holds these documents, each between BOS and EOS."""
    starts, ends = np.flatnonzero(stream == bos), np.flatnonzero(stream == eos)
    if not (len(starts) == len(ends) == len(lengths) and np.array_equal(ends - starts - 1, lengths)):
        return False
    return np.array_equal(stream[(stream != bos) & (stream != eos)], ids)


def compare(folder: Path, size: int, count: int, bos: int, eos: int) -> dict[str, float | bool]:
    """Time all sides by turns and compare their ids."""
    seconds: dict[str, list[float]] = {"ours": [], **{side: [] for side in OTHERS}}
    all_equal, tokens = True, 0
    with ExitStack() as stack:
        others = {side: Theirs(side, folder) for side in OTHERS}
        for other in others.values():
            stack.callback(other.close)
        for number in range(count):
            storage = share(Storage(str(folder / f"storage-{number}")))
            taken, tokens, plan = ours(folder, storage)
            seconds["ours"].append(taken)
            stream = our_stream(plan, storage)
            for side, other in others.items():
                taken, theirs = other.run()
                seconds[side].append(taken)
                with np.load(folder / f"{side}.npz") as found:
                    all_equal &= tokens == theirs and equal(stream, found["ids"], found["lengths"], bos, eos)
            shutil.rmtree(storage.root)
            taken_by = ", ".join(f"{side} {found[-1]:.2f} s" for side, found in seconds.items())
            print(f"round {number + 1}: {taken_by}, {tokens:,} tokens of {size / 1e6:.0f} distinct MB", flush=True)
    median = {side: statistics.median(found) for side, found in seconds.items()}
    print(f"{'':18}{'seconds':>10}{'tokens/s':>14}")
    for side, found in median.items():
        print(f"{side:18}{found:>10.2f}{tokens / found:>14,.0f}")
    return {
        **{f"tokens_per_s_{side}": round(tokens / found) for side, found in median.items()},
        "distinct_mb": round(size / 1e6),
        "ratio": round(median["datasets"] / median["ours"], 2),
        "ratio_encode_batch_fast": round(median["encode_batch_fast"] / median["ours"], 2),
        "ids_equal": bool(all_equal),
    }


def one_file(folder: Path, texts: list[str], size: float, count: int) -> dict[str, float]:
    """Prepare one file and ten files of a tenth by turns; here text may repeat itself."""
    files = {"one": 1, "ten": 10}
    for name, number in files.items():
        write_files(folder / name, cycle(texts), size, number)
    seconds: dict[str, list[float]] = {name: [] for name in files}
    ours(folder, share(Storage(str(folder / "storage-first"))), "text")  # Ray's workers import what they need
    for number in range(count):
        for name, found in seconds.items():
            storage = share(Storage(str(folder / f"storage-{name}-{number}")))
            found.append(ours(folder, storage, name)[0])
            shutil.rmtree(storage.root)
        print(f"round {number + 1}: one file {seconds['one'][-1]:.2f} s, ten {seconds['ten'][-1]:.2f} s", flush=True)
    one, ten = (statistics.median(found) for found in seconds.values())
    return {"one_file_s": round(one, 2), "ten_files_s": round(ten, 2), "one_file_ratio": round(one / ten, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000, help="of text, at most (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each side, by turns (default: %(default)s)")
    parser.add_argument("--text", nargs="+", metavar="JSONL", help="files to take the text from")
    parser.add_argument("--one-file", type=float, metavar="MB", help="time one file of this size against ten instead")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        OTHERS[args.serve[0]](Path(args.serve[1]))
        return

    os.sched_setaffinity(0, first_cores(CORES))  # and all that this process starts
    os.environ.update(RAY_worker_niceness="0")  # by default they give way to all else, the other sides too
    import ray

    with tempfile.TemporaryDirectory(prefix="doge-", dir="/tmp", ignore_cleanup_errors=True) as name:  # short paths
        folder = Path(name)
        texts = distinct(given_texts(args.text) if args.text else installation_texts(), int(args.megabytes * 1e6))
        size = write_files(folder / "text", texts, args.megabytes * 1e6, FILES)
        tokenizer = train_tokenizer(texts[:: max(1, len(texts) // 2000)])
        tokenizer.save_pretrained(folder / "tokenizer")
        ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, _temp_dir=f"{folder}/ray")
        try:
            if args.one_file:
                result = one_file(folder, texts, args.one_file * 1e6, args.rounds)
            else:
                result = compare(folder, size, args.rounds, tokenizer.bos_token_id, tokenizer.eos_token_id)
        finally:
            ray.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
