"""The eight Doge and Doge-MoE presets, and their parameters and FLOPs by arithmetic.

Dense models use transformers' own `DogeConfig`, so that transformers alone opens a checkpoint of ours. MoE models have
`model_type = "doge_moe"`, which transformers alone refuses: its own MoE layer computes something else, and loading ours
into it would be silently wrong.
"""

import difflib
import math
from dataclasses import dataclass, fields
from typing import TypeGuard

from transformers import DogeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from doge.common.errors import UserError

SPECIAL_TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

_DENSE_SIZES = {  # hidden, intermediate, layers, heads, key-value heads
    "Doge-20M": (256, 512, 8, 2, 1),
    "Doge-60M": (512, 1024, 16, 4, 2),
    "Doge-160M": (768, 1536, 24, 6, 3),
    "Doge-320M": (1024, 2048, 32, 8, 4),
}
_MOE_SIZES = {  # dense size it grows from, experts, expert heads, experts per token and head
    "Doge-MoE-20M": ("Doge-20M", 512, 1, 2),
    "Doge-MoE-80M": ("Doge-60M", 1024, 2, 4),
    "Doge-MoE-220M": ("Doge-160M", 1536, 3, 6),
    "Doge-MoE-500M": ("Doge-320M", 2048, 4, 8),
}


class DogeMoeConfig(DogeConfig):
    """Configuration of a Doge model whose feed-forward layers are a shared expert plus retrieved experts.

    Fields in addition to those of `DogeConfig`:
        num_experts: Experts in a layer, laid out on the grid of `expert_grid`.
        num_expert_heads: Independent retrievals per token.
        num_experts_per_tok: Experts that each expert head retrieves for a token.
        expert_retrieval_size: Size r of a head's query; each half, r / 2 wide, is matched against one side of the grid.
    """

    model_type = "doge_moe"
    base_model_tp_plan = None

    is_moe: bool = True
    num_experts: int = 512
    num_expert_heads: int = 1
    num_experts_per_tok: int = 2
    expert_retrieval_size: int = 256
    router_aux_loss_coef: float = 0.0


def has_experts(config: DogeConfig) -> TypeGuard[DogeMoeConfig]:
    """Whether it is a `DogeMoeConfig`: of this class, or of the copy of it that an exported model carries."""
    return config.model_type == DogeMoeConfig.model_type


def expert_grid(num_experts: int) -> tuple[int, int]:
    """The sides (n1, n2), n1 <= n2, n1 * n2 == num_experts, of the rectangle closest to a square."""
    rows = next(n for n in range(math.isqrt(num_experts), 0, -1) if num_experts % n == 0)
    return rows, num_experts // rows


@dataclass(frozen=True)
class ModelRecipe:
    """Which model to build: a preset by name, and fields to change in it (`None` keeps the preset's value).

    The names are those of `DogeConfig` and `DogeMoeConfig`; those about experts are for MoE presets only.
    """

    preset: str = "Doge-20M"
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    max_position_embeddings: int | None = None
    keep_window_size: int | None = None
    num_sink_keys: int | None = None
    """Places in the window reserved for the first keys of a document, whatever their bias. transformers has none."""
    num_local_keys: int | None = None
    """Places in the window reserved for the last keys, the query's own included. transformers has none."""
    num_experts: int | None = None
    num_expert_heads: int | None = None
    num_experts_per_tok: int | None = None
    expert_retrieval_size: int | None = None
    initializer_range: float | None = None
    """Standard deviation of fresh weights, whatever their shape."""
    initializer_scale: float | None = None
    """Fresh weights of the linear layers between embedding and output have a standard deviation of initializer_scale /
    sqrt(fan-in) instead of initializer_range, so that one value suits all widths."""

    def build(self) -> DogeConfig:
        """The configuration: `DogeMoeConfig` for an MoE preset, `DogeConfig` for a dense one.

        Raises:
            UserError: The preset is unknown, or fields do not fit together.
        """
        config = preset_config(self.preset)
        changes = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "preset"}
        changes = {name: value for name, value in changes.items() if value is not None}
        if not has_experts(config):
            for name in changes:
                if "expert" in name:
                    raise UserError(
                        f"{name} needs an MoE preset ({', '.join(_MOE_SIZES)}), but {self.preset} is dense."
                    )
        for name, value in changes.items():
            if name == "initializer_range":
                if not 0 < value < 1:
                    raise UserError(f"initializer_range must be between 0 and 1, not {value!r}.")
            elif name == "initializer_scale":
                if not 0 < value < math.inf:
                    raise UserError(f"initializer_scale must be positive and finite, not {value!r}.")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}.")
            setattr(config, name, value)
        check_config(config)
        return config


def preset_names() -> list[str]:
    """All preset names: the dense ones, then the MoE ones, each from small to large."""
    return [*_DENSE_SIZES, *_MOE_SIZES]


def preset_config(name: str) -> DogeConfig:
    """The configuration of a preset as published, such as `preset_config("Doge-MoE-20M")`.

    Raises:
        UserError: There is no such preset; the message names the nearest.
    """
    moe = {}
    size = name
    if name in _MOE_SIZES:
        size, num_experts, num_expert_heads, num_experts_per_tok = _MOE_SIZES[name]
        moe = {
            "num_experts": num_experts,
            "num_expert_heads": num_expert_heads,
            "num_experts_per_tok": num_experts_per_tok,
            "expert_retrieval_size": 256,
        }
    elif name not in _DENSE_SIZES:
        by_folded_name = {preset.lower(): preset for preset in preset_names()}
        (nearest,) = difflib.get_close_matches(name.lower(), by_folded_name, n=1, cutoff=0.0)
        raise UserError(f"There is no preset {name!r}; did you mean {by_folded_name[nearest]!r}?")
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads = _DENSE_SIZES[size]
    return (DogeMoeConfig if moe else DogeConfig)(
        vocab_size=32768,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=2048,
        keep_window_size=2048,
        tie_word_embeddings=True,
        # transformers' default of 0.001 makes trainers add an auxiliary MoE loss, even for a dense model.
        router_aux_loss_coef=0.0,
        **SPECIAL_TOKEN_IDS,
        **moe,
    )


def check_config(config: DogeConfig) -> None:
    """Raise UserError, naming the fields and their values, if fields do not fit together."""
    hidden_size, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if hidden_size % heads:
        raise UserError(f"hidden_size {hidden_size} must be divisible by num_attention_heads {heads}.")
    if heads % kv_heads:
        raise UserError(f"num_attention_heads {heads} must be divisible by num_key_value_heads {kv_heads}.")
    if head_dim(config) % 2:
        raise UserError(
            f"hidden_size {hidden_size} over num_attention_heads {heads} gives an odd head_dim of {head_dim(config)}, "
            "which rotary embeddings cannot split in two."
        )
    forced = getattr(config, "num_sink_keys", 0) + getattr(config, "num_local_keys", 0)
    if forced >= config.keep_window_size:
        raise UserError(
            f"num_sink_keys and num_local_keys, {forced} together, leave no free place in the keep_window_size "
            f"{config.keep_window_size}: lower them or raise it."
        )
    if config.sliding_window is not None:
        raise UserError(f"sliding_window must be None, not {config.sliding_window}: use keep_window_size.")
    rope = config.rope_parameters
    if rope["rope_type"] not in (known := ["default", *ROPE_INIT_FUNCTIONS]):
        raise UserError(f"rope_type {rope['rope_type']!r} is unknown: it must be {' or '.join(known)}.")
    if rope["rope_type"] != "proportional" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"partial_rotary_factor must be 1, not {rope['partial_rotary_factor']}: Doge rotates whole heads."
        )
    if not has_experts(config):
        if config.is_moe:
            raise UserError("A DogeConfig with is_moe=True is transformers' MoE layout: load it with load_model.")
        return
    if config.num_experts < 4 or expert_grid(config.num_experts)[0] == 1:
        raise UserError(
            f"num_experts {config.num_experts} has no grid n1 x n2 with both sides at least 2: choose a number that is "
            "not prime, best close to a square."
        )
    if config.num_experts_per_tok > config.num_experts:
        raise UserError(
            f"num_experts_per_tok {config.num_experts_per_tok} is more than the num_experts {config.num_experts}."
        )
    if config.expert_retrieval_size % 2:
        raise UserError(
            f"expert_retrieval_size {config.expert_retrieval_size} must be even: it is split in two halves."
        )


# Fields that change what a model starts from or how long its sequences may be, but not its function within its window.
_FREE_IN_CONTINUATION = {
    "preset", "initializer_range", "initializer_scale", "max_position_embeddings", "keep_window_size", "num_sink_keys",
    "num_local_keys",
}  # fmt: skip


def check_same_function(recipe: ModelRecipe, trained: ModelRecipe) -> None:
    """Raise UserError if weights trained as `trained` would compute another function in a model of `recipe`."""
    wanted, found = recipe.build().to_dict(), trained.build().to_dict()
    for name in sorted((wanted.keys() | found.keys()) - _FREE_IN_CONTINUATION):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"The checkpoint is of another model: its {name} is {found.get(name)}, not "
                f"{wanted.get(name)}; choose the recipe's model to match."
            )


def head_dim(config: DogeConfig) -> int:
    """Width of one attention head (transformers lets a config carry its own `head_dim`)."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def num_parameters(config: DogeConfig, active: bool = False) -> int:
    """The number of the model's parameters, computed without building it; tied embeddings count once.

    With `active`, only the parameters that one token uses count: of the experts, those retrieved for it.
    """
    hidden, width = config.hidden_size, head_dim(config)
    q_size, kv_size = config.num_attention_heads * width, config.num_key_value_heads * width
    attention = 2 * hidden * q_size + 2 * hidden * kv_size + kv_size * config.num_key_value_heads
    attention += config.num_key_value_heads + 2 * width  # A, q_norm, k_norm
    if config.attention_bias:
        attention += q_size + 2 * kv_size + config.num_key_value_heads + hidden
    feed_forward = 3 * hidden * config.intermediate_size
    if config.mlp_bias:
        feed_forward += 2 * config.intermediate_size + hidden
    if has_experts(config):
        heads, retrieval = config.num_expert_heads, config.expert_retrieval_size
        experts = heads * config.num_experts_per_tok if active else config.num_experts
        feed_forward += hidden * heads * retrieval + heads * sum(expert_grid(config.num_experts)) * retrieval // 2
        feed_forward += 2 * experts * hidden
    layer = attention + feed_forward + 4 * hidden  # two norms, two residual weights
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * layer + hidden


def training_flops(config: DogeConfig, tokens: float, keys: float) -> float:
    """Floating-point operations of training on tokens that attend to so many keys together, forward and backward.

    There are 6 per token and active parameter (2 forward, 4 backward; a tied embedding counts once, as the output
    head), and 12 per key, layer and query channel. This follows appendix B of the PaLM paper (arXiv:2204.02311), but
    counts only the keys that are attended to.
    """
    matmul_parameters = num_parameters(config, active=True)
    if not config.tie_word_embeddings:
        matmul_parameters -= config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim(config)
    return 6 * matmul_parameters * tokens + attention * keys


def flops_per_token(config: DogeConfig, document_length: int) -> float:
    """`training_flops` of a token, averaged over a document whose token i attends to min(i + 1, keep_window_size)."""
    window = min(config.keep_window_size, document_length)
    keys = window * (window + 1) / 2 + (document_length - window) * window
    return training_flops(config, document_length, keys) / document_length
