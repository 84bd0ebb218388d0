"""The Doge and Doge-MoE language models.

State dict, configuration and forward signature are those of transformers' `DogeForCausalLM`, so that a dense checkpoint
of either opens in the other with equal logits. The differences are how the same numbers are computed
(`doge.model.attention`, `doge.model.loss`), how experts are routed (`doge.model.experts`), and what a forward with
labels returns (`DogeForCausalLM.forward`).

Importing this module registers the MoE model with `AutoConfig` and `AutoModelForCausalLM`. The dense `model_type`
remains that of transformers' own model; `doge.load_model` opens a checkpoint of either kind as a model of ours.
"""

from dataclasses import dataclass
from typing import ClassVar, NoReturn

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
from transformers.generation import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.doge.modeling_doge import DogeMLP, DogeRMSNorm
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from doge.common.errors import UserError
from doge.model.attention import DogeAttention, DogeCache, document_ends
from doge.model.attention.rotary import RotaryEmbedding
from doge.model.configuration import DogeMoeConfig, check_config, has_experts
from doge.model.experts import DogeCDMoE
from doge.model.loss import IGNORE_INDEX, LMHead, next_token_targets


@dataclass
class DogeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """transformers' output and the number of tokens in the loss.

    Attributes:
        num_loss_tokens: int64 scalar, the number of targets that are not -100; None without labels.
    """

    num_loss_tokens: torch.Tensor | None = None


class DogeDecoderLayer(GradientCheckpointingLayer):
    """`h = w_pre * x + Attn(norm(x))`, then `h = w_post * h + FFN(norm(h))`, with learned vectors w that start at 1."""

    def __init__(self, config: DogeConfig, layer_idx: int):
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = DogeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DogeAttention(config, layer_idx)
        self.input_residual = nn.Parameter(torch.ones(config.hidden_size))
        self.post_attention_layernorm = DogeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = DogeCDMoE(config) if has_experts(config) else DogeMLP(config)
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
        scale = getattr(self.config, "initializer_scale", None)
        if scale is not None and isinstance(module, nn.Linear) and not isinstance(module, LMHead):
            init.normal_(module.weight, mean=0.0, std=scale * module.in_features**-0.5)
        elif isinstance(module, DogeAttention):
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
        # No padding_idx: the id that the configuration calls PAD may be an ordinary token of the tokenizer.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DogeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = DogeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DogeCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """The normalised hidden states (batch, seq, hidden_size) of the last layer.

        Args:
            input_ids: (batch, seq); alternatively, give inputs_embeds.
            attention_mask: (batch, cached + seq), 0 at padding. The cache remembers the padding of cached tokens.
            position_ids: (batch or 1, seq); by default, they count the real tokens of each row. Where they restart
                within a row, without padding and cached tokens, a new document begins. Documents do not see each
                other, and no cache is returned, because later tokens could not continue them.
            past_key_values: A `DogeCache`.
            inputs_embeds: (batch, seq, hidden_size), instead of input_ids.
            use_cache: Whether to return a cache; by default as the configuration says, but never in training.

        Raises:
            UserError: The mask is not (batch, seq), or the cache is of another kind.
            ValueError: Both or neither of input_ids and inputs_embeds are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        _check_cache(past_key_values)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise UserError(
                f"attention_mask must have the shape (batch, seq), not {tuple(attention_mask.shape)}: the model itself "
                "computes the causal and the dynamic mask."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, seq = inputs_embeds.shape[:2]
        num_cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        order = None if attention_mask is None else _places(attention_mask)[:, -seq:]
        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq:]
            else:
                position_ids = torch.arange(num_cached, num_cached + seq, device=inputs_embeds.device).unsqueeze(0)
        ends = None if attention_mask is not None or num_cached else document_ends(position_ids, batch)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        packs_documents = past_key_values is not None and past_key_values.packs_documents
        if (ends is not None and not packs_documents) or (self.training and self.gradient_checkpointing):
            past_key_values = None
        elif use_cache and past_key_values is None:
            past_key_values = DogeCache(self.config)
        if past_key_values is not None:
            past_key_values.check_fits(self.config.num_hidden_layers, batch)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer for transformers' assistant_early_exit
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                document_ends=ends,
                order=order,
                past_key_values=past_key_values,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def _check_cache(past_key_values: object) -> None:
    if past_key_values is not None and not isinstance(past_key_values, DogeCache):
        raise UserError(
            f"past_key_values must be a DogeCache, not {type(past_key_values).__name__}: leave out both it and "
            "cache_implementation to get one."
        )


def _places(attention_mask: torch.Tensor) -> torch.Tensor:
    """Each token's place in its row, counted from the padding on the row's left; negative at padding.

    (batch, seq), 0 at padding -> (batch, seq) int64.
    """
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    places = columns - (attention_mask != 0).int().argmax(-1, keepdim=True)
    return torch.where(attention_mask == 0, columns - 2**30, places)


class DogeForCausalLM(DogePreTrainedModel, GenerationMixin):
    """Doge with its output head; dense with a `DogeConfig`, MoE with a `DogeMoeConfig`.

    Attributes:
        return_logits: Whether a forward with labels also returns the logits; see `forward`.
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    return_logits: bool = False

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        self.model = DogeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """Let `generate` use a `DogeCache` instead of a cache of transformers."""
        wanted = generation_config.cache_implementation
        if wanted is not None:
            raise UserError(
                f"cache_implementation={wanted!r} does not work with Doge, which has its own cache: leave it out."
            )
        window = self.config.keep_window_size
        if generation_mode is GenerationMode.ASSISTED_GENERATION and max_cache_length > window:
            raise UserError(
                "Assisted decoding and prompt lookup remove rejected tokens from the cache, which Doge's allows up to "
                f"its keep_window_size of {window} tokens, and prompt and new tokens may be {max_cache_length + 1}: "
                "lower max_new_tokens, or leave out assistant_model and prompt_lookup_num_tokens."
            )
        _check_cache(model_kwargs.get("past_key_values"))
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = DogeCache(self.config)

    def init_continuous_batching(self, *args, **kwargs) -> NoReturn:
        """Refuse `generate_batch` of transformers, which needs a cache in pages."""
        raise UserError(
            "generate_batch does not work with Doge, which has its own cache: use generate, or doge.Decoder, which "
            "takes prompts of any lengths."
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DogeCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        *,
        reduction: str = "mean",
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        return_logits: bool | None = None,
        z_loss: float = 0.0,
        **kwargs,
    ) -> DogeCausalLMOutputWithPast:
        """Without labels, return the logits; with labels the loss, and the logits only on request.

        The loss is computed without all (tokens, vocab_size) logits at once, which would be most of a small model's
        memory. Tools that need both, such as TRL's trainers, set `return_logits`, as argument or attribute of the
        model, and pay that memory.

        Args:
            labels: (batch, seq), aligned with input_ids and shifted here; -100 does not count. In packed documents, the
                first token of each must have the label -100.
            logits_to_keep: As in transformers; the loss ignores it and covers all positions.
            reduction: "mean" over the counted tokens, or "sum"; both are 0 if no token counts.
            num_items_in_batch: If given, the loss is the sum divided by it, as transformers' trainers need.
            shift_labels: (batch, seq), labels that are already shifted, instead of labels.
            return_logits: Whether to return the logits along with the loss; by default the attribute's value.
            z_loss: Adds so much times the square of each counted token's log-sum-exp of logits to the loss.
            others: See `DogeModel.forward`.

        Returns:
            `loss` (float32 scalar) and `num_loss_tokens`, or `logits` (batch, seq, vocab_size), and the cache.

        Raises:
            UserError: The reduction is unknown; see also `DogeModel.forward`.
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
            loss = self.lm_head(hidden_states, targets, z_loss)
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
    """The class that `AutoModelForCausalLM` uses for `model_type = "doge_moe"`."""

    config: DogeMoeConfig
    config_class = DogeMoeConfig


def build_model(config: DogeConfig) -> DogeForCausalLM:
    """Build a freshly initialised model of the class that fits the configuration."""
    return (DogeMoeForCausalLM if has_experts(config) else DogeForCausalLM)(config)


AutoConfig.register("doge_moe", DogeMoeConfig, exist_ok=True)
AutoModelForCausalLM.register(DogeMoeConfig, DogeMoeForCausalLM, exist_ok=True)
