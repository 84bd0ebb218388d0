"""The Doge language models in one process: model, tokenizer, training, conversion, generation, evaluation.

Nothing here imports Ray. `load_model` and `Decoder` are imported at their first use, so that importing the package
imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from doge.conversion.load import load_model
    from doge.generation.decoder import Decoder

__all__ = ["Decoder", "load_model"]

_MODULES = {"Decoder": "doge.generation.decoder", "load_model": "doge.conversion.load"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
