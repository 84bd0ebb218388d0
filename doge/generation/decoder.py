"""The fast path of decoding: one compiled step over a cache of fixed slots, and nothing else between two tokens.

The step is the model's own function with the matrices that read the same states joined, on the slots of a `DogeCache`.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.doge.modeling_doge import apply_rotary_pos_emb

from doge.attention.cache import DogeCache, attend_slots, insert_key
from doge.attention.window import KeyWindow
from doge.compilation import can_compile
from doge.errors import UserError
from doge.experts import DogeCDMoE
from doge.generation.sampling import Sampling
from doge.modeling import DogeForCausalLM

SLOT_STEP = 64  # slots are made in multiples of it
LAYERS_TOGETHER = 8  # layers of one compiled graph: compiling takes as long as they are many, calling a graph 0.1 ms


class Decoder:
    """Generates with a model as it is now; a decoder of another state of it is made anew.

    Args:
        model: on its device, in the precision to decode in; it is not changed.
        compile: the step with torch.compile, where this machine can: at the first token, once for one row and once for
            more, half a minute or a few seconds where torch has it in its cache.
    """

    def __init__(self, model: DogeForCausalLM, compile: bool = True):
        self.model, self.config = model.eval(), model.config
        if self.config.attention_bias or self.config.mlp_bias or self.config.hidden_act != "silu":
            raise UserError(
                "The fast decoder takes models without attention_bias and mlp_bias and with hidden_act 'silu', as all "
                "presets are: use model.generate."
            )
        layers = [LayerWeights.of(layer) for layer in model.model.layers]
        self._chunks = [layers[start : start + LAYERS_TOGETHER] for start in range(0, len(layers), LAYERS_TOGETHER)]
        self._window = KeyWindow.of(self.config)
        self._compiles = compile and can_compile(model.device.type)
        functions = (_begin, _run_layers, _end)
        self._functions = [torch.compile(each, fullgraph=True) for each in functions] if self._compiles else functions

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        num_return_sequences: int = 1,
        eos_token_id: int | None = None,
    ) -> list[list[int]]:
        """The tokens that follow each prompt, without the end token.

        Prompts may differ in length. Each different prompt is read once, however often it occurs.

        Args:
            num_return_sequences: continuations of each prompt, one after another in the result.
            eos_token_id: ends a row; by default the model's. -1 for none.
        """
        end = self.config.eos_token_id if eos_token_id is None else eos_token_id
        rows: list[list[int]] = [[] for _ in range(len(prompts) * num_return_sequences)]
        running = set(range(len(rows)))
        for tokens in self.stream(prompts, max_new_tokens, sampling, num_return_sequences):
            found = tokens.tolist()
            running -= {row for row in running if found[row] == end}
            for row in running:
                rows[row].append(found[row])
            if not running:
                break
        return rows

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        num_return_sequences: int = 1,
    ) -> Iterator[torch.Tensor]:
        """The next tokens of all rows, (rows,) int64, one step after another; as `generate`, but nothing ends a row."""
        if not prompts or not all(prompts):
            raise UserError("There is nothing to go on from: give prompts of at least one token each.")
        device = self.model.device
        generator = sampling.generator(device)
        logits, cache, lengths = self._read(prompts, max_new_tokens, num_return_sequences)
        tokens = sampling.choose(logits, generator)
        yield tokens
        slots = [(layer.keys, layer.values, layer.biases, layer.orders) for layer in cache.layers]
        if self._compiles:
            for states in itertools.chain(*slots):
                torch._dynamo.mark_dynamic(states, 2)
        for number in range(max_new_tokens - 1):
            tokens, logits = self._step(tokens, lengths + number, slots, greedy=not sampling.do_sample)
            if sampling.do_sample:
                tokens = sampling.choose(logits, generator)
            yield tokens

    def _read(self, prompts, max_new_tokens: int, repeats: int) -> tuple[torch.Tensor, DogeCache, torch.Tensor]:
        """Logits of the rows' next tokens, the cache, and how many tokens each row has."""
        device = self.model.device
        places = {tuple(prompt): place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        longest = max(map(len, places))
        needed = longest + max_new_tokens
        cache = DogeCache(self.config, slots=-(-needed // SLOT_STEP) * SLOT_STEP)
        ids = torch.zeros(len(places), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for prompt, place in places.items():
            ids[place, longest - len(prompt) :] = torch.tensor(prompt)
            mask[place, longest - len(prompt) :] = 1
        output = self.model(
            ids.to(device), attention_mask=mask.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        rows = torch.tensor([places[tuple(prompt)] for prompt in prompts for _ in range(repeats)], device=device)
        cache.batch_select_indices(rows)
        return output.logits[rows, -1], cache, mask.sum(-1).to(device)[rows]

    def _step(self, tokens, lengths, slots, greedy: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows' next tokens, where ``greedy``, and their logits; ``slots`` take the present tokens in."""
        model, eps = self.model.model, self.config.rms_norm_eps
        fuses = self._compiles and len(tokens) == 1 and _fuses(model.embed_tokens.weight)
        begin, run_layers, end = self._functions
        states, cos, sin = begin(tokens, lengths, model.embed_tokens.weight, model.rotary_emb)
        for number, chunk in enumerate(self._chunks):
            own = slots[number * LAYERS_TOGETHER :][: len(chunk)]
            states = run_layers(states, lengths, cos, sin, chunk, own, self._window, eps, fuses)
        return end(states, model.norm.weight, self.model.lm_head.weight, eps, greedy, fuses)


def _fuses(weight: torch.Tensor) -> bool:
    """Whether a product with one row is faster as a sum that torch.compile fuses than as a call of the library.

    On a CPU the library reads float32 at half of the memory's speed (MKL's product of one row with 32,768 x 256), the
    generated loop at four fifths of it; in bfloat16 it is the other way round.
    """
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _linear(states: torch.Tensor, weight: torch.Tensor, fuses: bool) -> torch.Tensor:
    """As `F.linear`, of one row if ``fuses``."""
    return (weight * states).sum(-1)[None] if fuses else F.linear(states, weight)


class LayerWeights(NamedTuple):
    """The parameters of a layer, those side by side that read the same states.

    Args:
        qkv: (heads + 2 kv_heads) * head_dim rows, as (rows, hidden_size).
        gate_up: (2 * intermediate_size, hidden_size); None with `down` where the layer has experts.
        experts: the module with them.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    A: torch.Tensor
    dt: torch.Tensor
    o: torch.Tensor
    input_residual: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor | None
    down: torch.Tensor | None
    post_residual: torch.Tensor
    experts: nn.Module | None

    @staticmethod
    def of(layer: nn.Module) -> "LayerWeights":
        attention, mlp = layer.self_attn, layer.mlp
        has_experts = isinstance(mlp, DogeCDMoE)
        return LayerWeights(
            input_norm=layer.input_layernorm.weight,
            qkv=torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
            q_norm=attention.q_norm.weight,
            k_norm=attention.k_norm.weight,
            A=attention.A,
            dt=attention.dt_proj.weight,
            o=attention.o_proj.weight,
            input_residual=layer.input_residual,
            post_norm=layer.post_attention_layernorm.weight,
            gate_up=None if has_experts else torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            down=None if has_experts else mlp.down_proj.weight,
            post_residual=layer.post_attention_residual,
            experts=mlp if has_experts else None,
        )


def _begin(tokens, lengths, embedding, rotary):
    states = F.embedding(tokens, embedding)
    return states, *rotary(states, position_ids=lengths[:, None])


def _run_layers(states, lengths, cos, sin, layers, slots, window, eps, fuses):
    for weights, own in zip(layers, slots, strict=True):
        states = _layer(states, weights, own, cos, sin, lengths, window, eps, fuses)
    return states


def _end(states, norm, head, eps, greedy, fuses):
    logits = _linear(_rms_norm(states, norm, eps), head, fuses)
    return logits.argmax(-1) if greedy else None, logits


def _layer(states, weights, slots, cos, sin, lengths, window, eps, fuses):
    rows, head_dim, kv_heads = len(states), weights.q_norm.shape[0], weights.A.shape[0]
    joined = _linear(_rms_norm(states, weights.input_norm, eps), weights.qkv, fuses).view(rows, 1, -1, head_dim)
    query, key, value = joined.split([joined.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    bias = torch.exp(weights.A.float() * F.softplus(F.linear(value.flatten(2), weights.dt).float()))
    query, key = _rms_norm(query, weights.q_norm, eps), _rms_norm(key, weights.k_norm, eps)
    query, key = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=2)
    query, key, value, bias = (part.transpose(1, 2) for part in (query, key, value, bias))
    order = lengths[:, None, None].expand(-1, kv_heads, 1)
    insert_key(*slots, key, value, bias, order, window)
    mixed = _linear(attend_slots(query, *slots[:3]).flatten(1), weights.o, fuses)
    states = torch.addcmul(mixed, weights.input_residual, states)
    transformed = _rms_norm(states, weights.post_norm, eps)
    if weights.experts is not None:
        transformed = weights.experts(transformed)
    else:
        gate, up = _linear(transformed, weights.gate_up, fuses).chunk(2, dim=-1)
        transformed = _linear(F.silu(gate) * up, weights.down, fuses)
    return torch.addcmul(transformed, weights.post_residual, states)


def _rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = states.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(states.dtype)
