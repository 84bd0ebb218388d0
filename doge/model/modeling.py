"""The Doge and Doge-MoE language models.

State dict, configuration and forward signature are those of transformers' `DogeForCausalLM`, so that a dense checkpoint
of either opens in the other with equal logits. What differs is how the same numbers are computed
(`doge.model.attention`, `doge.model.loss`), how experts are routed (`doge.model.experts`), and the loss: see
`DogeForCausalLM.forward`.

Importing this module registers the MoE model with `AutoConfig` and `AutoModelForCausalLM`. The dense `model_type`
stays transformers' own there; open a checkpoint of either kind as ours with `doge.conversion.load.load_model`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DogeConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.doge.modeling_doge import DogeMLP, DogeRMSNorm, DogeRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from doge.common.errors import UserError
from doge.model.attention import DogeAttention, DogeCache, document_ends
from doge.model.configuration import DogeMoeConfig, check_config
from doge.model.experts import DogeCDMoE
from doge.model.loss import IGNORE_INDEX, LMHead, next_token_targets


@dataclass
class DogeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """transformers' output, and how many tokens the loss was taken over.

    num_loss_tokens: int64 scalar, present with labels: the targets that were not -100.
    """

    num_loss_tokens: torch.LongTensor | None = None


class DogeDecoderLayer(GradientCheckpointingLayer):
    """`h = w_pre * x + Attn(norm(x))`, then `h = w_post * h + FFN(norm(h))`, with learned vectors w that start at 1."""

    def __init__(self, config: DogeConfig, layer_idx: int):
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = DogeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DogeAttention(config, layer_idx)
        self.input_residual = nn.Parameter(torch.ones(config.hidden_size))
        self.post_attention_layernorm = DogeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = DogeCDMoE(config) if isinstance(config, DogeMoeConfig) else DogeMLP(config)
        self.post_attention_residual = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor, **attention_inputs) -> torch.Tensor:
        """(batch, seq, hidden_size) -> the same; see `DogeAttention.forward` for the other inputs."""
        mixed = self.self_attn(self.input_layernorm(hidden_states), **attention_inputs)
        hidden_states = torch.addcmul(self._dropout(mixed), self.input_residual, hidden_states)
        transformed = self.mlp(self.post_attention_layernorm(hidden_states))
        return torch.addcmul(self._dropout(transformed), self.post_attention_residual, hidden_states)

    def _dropout(self, states: torch.Tensor) -> torch.Tensor:
        return F.dropout(states, p=self.hidden_dropout, training=self.training) if self.hidden_dropout else states


class DogePreTrainedModel(PreTrainedModel):
    config: DogeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["DogeDecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = False
    _can_record_outputs: ClassVar = {"hidden_states": DogeDecoderLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # linear, embedding and norm weights
        if isinstance(module, DogeAttention):
            init.zeros_(module.A)
        elif isinstance(module, DogeDecoderLayer):
            init.ones_(module.input_residual)
            init.ones_(module.post_attention_residual)
        elif isinstance(module, DogeCDMoE):
            # Unit length on average; were they equal (zero), every token would retrieve the same experts.
            init.normal_(module.keys, mean=0.0, std=module.keys.shape[-1] ** -0.5)


class DogeModel(DogePreTrainedModel):
    """The decoder without its output head."""

    def __init__(self, config: DogeConfig):
        check_config(config)
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DogeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = DogeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DogeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DogeCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Hidden states (batch, seq, hidden_size) of the last layer, normalised.

        Args:
            input_ids: (batch, seq); or else inputs_embeds, (batch, seq, hidden_size).
            attention_mask: (batch, cached + seq), 0 at padding. The padding of cached tokens is remembered.
            position_ids: (batch or 1, seq). By default they count the real tokens of each row. Where they restart
                within a row, without padding and without cached tokens, a new document begins: documents do not see
                each other, and no cache is returned, for there is nothing that later tokens could continue.
            past_key_values: a `DogeCache`.
            use_cache: whether to return one; by default as the config says, but not in training.

        Raises:
            UserError: a mask that is not (batch, seq), or a cache of another kind that already holds something.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if past_key_values is not None and not isinstance(past_key_values, DogeCache):
            raise UserError(
                f"past_key_values must be a DogeCache, not {type(past_key_values).__name__}: leave it and "
                "cache_implementation out, and one is made."
            )
        if attention_mask is not None and attention_mask.ndim != 2:
            raise UserError(
                f"attention_mask must have the shape (batch, seq), not {tuple(attention_mask.shape)}: the causal and "
                "the dynamic mask are computed inside."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, seq = inputs_embeds.shape[:2]
        num_cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        padded = attention_mask is not None and not attention_mask.all()
        order = None
        if padded:  # a row begins after the padding on its left; places at padding are negative
            columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
            order = columns - (attention_mask != 0).int().argmax(-1, keepdim=True)
            order = torch.where(attention_mask == 0, columns - 2**30, order)[:, -seq:]
        if position_ids is None:
            if padded:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq:]
            else:
                position_ids = torch.arange(num_cached, num_cached + seq, device=inputs_embeds.device).unsqueeze(0)
        ends = None if padded or num_cached else document_ends(position_ids, batch)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        packs_documents = past_key_values is not None and past_key_values.packs_documents
        if (ends is not None and not packs_documents) or (self.training and self.gradient_checkpointing):
            past_key_values = None
        elif use_cache and past_key_values is None:
            past_key_values = DogeCache(self.config)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                document_ends=ends,
                order=order,
                past_key_values=past_key_values,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class DogeForCausalLM(DogePreTrainedModel, GenerationMixin):
    """Doge with its output head; dense with a `DogeConfig`, MoE with a `DogeMoeConfig`.

    Attributes:
        return_logits: whether a forward with labels also returns the logits; see `forward`.
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    return_logits: bool = False

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        self.model = DogeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        """Let `generate` use a `DogeCache` where it would make one of its own."""
        wanted = generation_config.cache_implementation
        if wanted is not None:
            raise UserError(
                f"cache_implementation={wanted!r} is not for Doge, which has a cache of its own: leave it out."
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = DogeCache(self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DogeCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        *,
        reduction: str = "mean",
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.LongTensor | None = None,
        return_logits: bool | None = None,
        **kwargs,
    ) -> DogeCausalLMOutputWithPast:
        """Logits without labels; with labels the loss, and the logits only on request.

        The loss comes without the (tokens, vocab_size) logits ever existing, which is most of a small model's memory.
        Tools that want both, such as TRL's trainers, set `return_logits` (argument, or attribute of the model); they
        then pay for them.

        Args:
            labels: (batch, seq), aligned with input_ids and shifted in here; -100 does not count. For packed documents
                the data must put -100 on the first token of each.
            shift_labels: labels already shifted; takes the place of labels.
            reduction: "mean" over the counted tokens, or "sum"; either is 0 where none counts.
            num_items_in_batch: given, the loss is the sum divided by it, as transformers' trainers ask.
            logits_to_keep: as in transformers; ignored by the loss, which is taken over all positions.
            The others: see `DogeModel.forward`.

        Returns:
            `loss` (float32 scalar) and `num_loss_tokens`, or `logits` (batch, seq, vocab_size), and the cache.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = num_loss_tokens = None
        targets = next_token_targets(labels) if shift_labels is None and labels is not None else shift_labels
        if targets is not None:
            if reduction not in ("mean", "sum"):
                raise UserError(f"reduction must be 'mean' or 'sum', not {reduction!r}.")
            num_loss_tokens = (targets != IGNORE_INDEX).sum()
            loss = self.lm_head(hidden_states, targets)
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
            elif reduction == "mean":
                loss = loss / num_loss_tokens.clamp(min=1)
        if loss is None or (self.return_logits if return_logits is None else return_logits):
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        return DogeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            num_loss_tokens=num_loss_tokens,
        )


class DogeMoeForCausalLM(DogeForCausalLM):
    """The class that `AutoModelForCausalLM` gives for `model_type = "doge_moe"`."""

    config: DogeMoeConfig
    config_class = DogeMoeConfig


def build_model(config: DogeConfig) -> DogeForCausalLM:
    """A freshly initialised model of the class that fits the configuration."""
    return (DogeMoeForCausalLM if isinstance(config, DogeMoeConfig) else DogeForCausalLM)(config)


AutoConfig.register("doge_moe", DogeMoeConfig, exist_ok=True)
AutoModelForCausalLM.register(DogeMoeConfig, DogeMoeForCausalLM, exist_ok=True)
