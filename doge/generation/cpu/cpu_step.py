"""The decoding step of a dense model on a CPU: the C++ library `cpu_step.cpp`, compiled once per machine.

With small matrices, PyTorch's products of one row reach a third of the memory's bandwidth, and a small model also waits
for the calls between them. One parallel region for a whole step reads the weights at nearly the memory's speed.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from pathlib import Path

import torch

from doge.common.storage import StorageError, private_cache
from doge.generation.int8 import Int8
from doge.generation.prefill import Prompt, prefill
from doge.generation.weights import LayerWeights
from doge.model.attention.cache import NO_KEY, Slots
from doge.model.attention.window import KeyWindow
from doge.model.modeling import DogeForCausalLM

_SOURCE = Path(__file__).with_name("cpu_step.cpp")
_HEADER = Path(__file__).with_name("cpu_vectors.h")
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_TYPES = {torch.float32: "float", torch.bfloat16: "uint16_t", torch.int8: "int8_t"}

_log = logging.getLogger(__name__)


class _Matrix(Structure):
    _fields_ = (("data", c_void_p), ("scale", c_void_p))


class _Layer(Structure):
    _matrices = ("qkv", "o", "gate_up", "down")
    _vectors = ("input_norm", "q_norm", "k_norm", "A", "dt", "input_residual", "post_norm", "post_residual")
    _slots = ("keys", "values", "biases", "orders")
    _fields_ = (*((name, _Matrix) for name in _matrices), *((name, c_void_p) for name in (*_vectors, *_slots)))


class _Model(Structure):
    _sizes = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "sinks", "local")
    _fields_ = (
        *((name, c_int64) for name in _sizes),
        ("eps", c_float), ("rotary_scaling", c_float),
        ("inverse_frequencies", c_void_p), ("norm", c_void_p),
        ("embedding", _Matrix), ("head", _Matrix), ("layer", POINTER(_Layer)),
    )  # fmt: skip


class CpuStep:
    """Computes the same as `TorchStep`, with logits in float32.

    For bfloat16 weights on a processor that multiplies pairs of bfloat16, the states of four or more rows are rounded
    to bfloat16 before each product, as PyTorch rounds all states; otherwise they stay float32.
    """

    def __init__(
        self,
        model: DogeForCausalLM,
        layers: list[LayerWeights],
        embedding: torch.Tensor | Int8,
        head: torch.Tensor | Int8,
    ):
        config = model.config
        frequencies, rotary_scaling = model.model.rotary_emb.frequencies()
        library = _library(*_types(model, layers))
        assert library is not None  # `supports` was asked
        self._library = library
        self._lock = threading.Lock()  # each step writes its slots into the structures
        self._kept: list[torch.Tensor] = []  # what the structures point to
        self._layers = (_Layer * len(layers))()
        for own, found in zip(self._layers, layers, strict=True):
            for name in _Layer._matrices:
                setattr(own, name, self._matrix(getattr(found, name)))
            for name in _Layer._vectors:
                setattr(own, name, self._vector(getattr(found, name)))
        self._read_by, self._window = model, KeyWindow.of(config)
        first = layers[0]
        self._model = _Model(
            layers=len(layers), hidden=config.hidden_size, heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads, head_dim=len(first.q_norm), intermediate=config.intermediate_size,
            vocab=config.vocab_size, eps=config.rms_norm_eps,
            sinks=self._window.num_sinks, local=self._window.num_local,
            rotary_scaling=rotary_scaling, inverse_frequencies=self._vector(frequencies),
            norm=self._vector(model.model.norm.weight), embedding=self._matrix(embedding), head=self._matrix(head),
            layer=self._layers,
        )  # fmt: skip

    @staticmethod
    def supports(model: DogeForCausalLM, layers: list[LayerWeights]) -> bool:
        """Whether the library supports the model and can be compiled here; a failed compilation is logged once."""
        if model.device.type != "cpu" or layers[0].experts is not None or model.dtype not in _TYPES:
            return False
        sizes = (model.config.hidden_size, model.config.intermediate_size)
        if model.model.rotary_emb.rope_type != "default" or any(size % 2 for size in sizes):
            return False
        return _library(*_types(model, layers)) is not None

    def __call__(self, tokens: torch.Tensor, lengths: torch.Tensor, slots: list[Slots], greedy: bool) -> torch.Tensor:
        """See `TorchStep.__call__`."""
        if greedy:
            found = torch.empty_like(tokens)
            logits, chosen = None, found.data_ptr()
        else:
            found = torch.empty(len(tokens), self._model.vocab, dtype=torch.float32, device="cpu")
            logits, chosen = found.data_ptr(), None
        with self._lock:
            self._use(slots)
            self._library.doge_step(
                ctypes.byref(self._model), len(tokens), slots[0].keys.shape[2], torch.get_num_threads(),
                tokens.data_ptr(), lengths.data_ptr(), logits, chosen,
            )  # fmt: skip
        return found

    def prefill(self, prompts: Sequence[Prompt], slots: int) -> tuple[torch.Tensor, list[Slots]]:
        """See `doge.generation.prefill.prefill`, which reads the prompts that are longer than the window.

        A prefix that all other prompts share is read once.
        """
        slots = min(slots, self._window.size)
        long = [row for row, prompt in enumerate(prompts) if len(prompt) > slots]
        short = [row for row, prompt in enumerate(prompts) if len(prompt) <= slots]
        parts = []
        if long:
            parts.append(prefill(self._read_by, [prompts[row] for row in long], slots))
        if short:
            parts.append(self._prefill_short([prompts[row] for row in short], slots))
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor(long + short, device="cpu").argsort()
        logits = torch.cat([logits for logits, _ in parts])[order]
        layers = zip(*(layers for _, layers in parts), strict=True)
        return logits, [Slots(*(torch.cat(states)[order] for states in zip(*each, strict=True))) for each in layers]

    def _prefill_short(self, prompts: Sequence[Prompt], slots: int) -> tuple[torch.Tensor, list[Slots]]:
        shared = _common_prefix_length(prompts) if len(prompts) > 1 else 0
        found = [self._empty(1 if shared else len(prompts), slots) for _ in self._layers]
        if shared:
            self._advance([prompts[0][:shared]], found, 0)
            repeats = torch.zeros(len(prompts), dtype=torch.int64, device="cpu")
            found = [Slots(*(states[repeats] for states in layer)) for layer in found]
        return self._advance([prompt[shared:] for prompt in prompts], found, shared), found

    def _advance(self, prompts: Sequence[Prompt], slots: list[Slots], begin: int) -> torch.Tensor:
        """Append prompts to rows that hold ``begin`` tokens: the next tokens' logits, (rows, vocab_size) float32."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device="cpu")
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device="cpu")
        rows = torch.arange(len(prompts), device="cpu").repeat_interleave(lengths)
        ends = lengths.cumsum(0) - 1
        places = begin + torch.arange(len(tokens), device="cpu") - (ends + 1 - lengths)[rows]
        logits = torch.empty(len(prompts), self._model.vocab, dtype=torch.float32, device="cpu")
        with self._lock:
            self._use(slots)
            self._library.doge_read(
                ctypes.byref(self._model), len(prompts), slots[0].keys.shape[2], torch.get_num_threads(),
                tokens.data_ptr(), places.data_ptr(), rows.data_ptr(), len(tokens), ends.data_ptr(), logits.data_ptr(),
            )  # fmt: skip
        return logits

    def _empty(self, rows: int, slots: int) -> Slots:
        shape = (rows, self._model.kv_heads, slots)
        wide = (*shape, self._model.head_dim)
        return Slots(
            torch.zeros(wide, dtype=self._read_by.dtype, device="cpu"),
            torch.zeros(wide, dtype=self._read_by.dtype, device="cpu"),
            torch.full(shape, -torch.inf, dtype=torch.float32, device="cpu"),
            torch.full(shape, NO_KEY, device="cpu"),
        )

    def _use(self, slots: list[Slots]) -> None:
        for own, states in zip(self._layers, slots, strict=True):
            for name, tensor in zip(_Layer._slots, states, strict=True):
                assert tensor.is_contiguous()
                setattr(own, name, tensor.data_ptr())

    def _matrix(self, weight: torch.Tensor | Int8) -> _Matrix:
        if isinstance(weight, Int8):
            return _Matrix(self._keep(weight.data), self._keep(weight.scale))
        return _Matrix(self._keep(weight.detach()), None)

    def _vector(self, states: torch.Tensor) -> int:
        return self._keep(states.detach().float())

    def _keep(self, states: torch.Tensor) -> int:
        self._kept.append(states.contiguous())
        return self._kept[-1].data_ptr()


def _common_prefix_length(prompts: Sequence[Prompt]) -> int:
    """The length of the prefix that all prompts share, shorter than any of them."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # in lexicographic order
    longest = min(map(len, prompts)) - 1
    return next((i for i in range(longest) if first[i] != last[i]), longest)


def _types(model: DogeForCausalLM, layers: list[LayerWeights]) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the matrices and of the slots."""
    weight = layers[0].qkv
    return weight.data.dtype if isinstance(weight, Int8) else weight.dtype, model.dtype


@functools.cache
def _library(weight: torch.dtype, slot: torch.dtype) -> ctypes.CDLL | None:
    """The compiled library, from the cache if it is there; None if it cannot be compiled, which is logged."""
    compiler = next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))), None)
    try:
        if compiler is None:
            raise OSError("there is no C++ compiler: install g++")
        library = ctypes.CDLL(
            str(_compiled(compiler, [*_FLAGS, f"-DWEIGHT={_TYPES[weight]}", f"-DSLOT={_TYPES[slot]}"]))
        )
    except (OSError, StorageError) as error:
        _log.warning(
            "The fast decoding step cannot be compiled (%s): PyTorch computes the same results, more slowly.", error
        )
        return None
    library.doge_step.argtypes = [c_void_p, *[c_int64] * 3, *[c_void_p] * 4]
    library.doge_read.argtypes = [c_void_p, *[c_int64] * 3, *[c_void_p] * 3, c_int64, c_void_p, c_void_p]
    library.doge_step.restype = library.doge_read.restype = None
    return library


def _compiled(compiler: str, flags: list[str]) -> Path:
    """The library's file, compiled unless the cache has one of this source, compiler and processor. Raises OSError."""
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    parts = [_SOURCE.read_bytes(), _HEADER.read_bytes(), *map(str.encode, flags), version, _processor()]
    path = Path(private_cache(), f"decoding-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so")
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, path.name)
            done = subprocess.run([compiler, *flags, str(_SOURCE), "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"{compiler} says: {' '.join(done.stderr.split())[:200]}")
            made.replace(path)
    return path


def _processor() -> bytes:
    """Identifies the processor's instruction set, because machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))
