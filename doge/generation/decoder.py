"""Fast decoding: one compiled step per token over a cache of fixed slots."""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch

from doge.common.errors import UserError
from doge.generation.cpu.cpu_step import CpuStep
from doge.generation.int8 import Int8
from doge.generation.sampling import Sampling
from doge.generation.torch_step import TorchStep
from doge.generation.weights import LayerWeights
from doge.model.attention.cache import Slots
from doge.model.modeling import DogeDecoderLayer, DogeForCausalLM

SLOT_STEP = 64  # numbers of slots are multiples of it


class Decoder:
    """Generates with a model's present weights; after an update of the weights, make a new decoder. Thread-safe.

    A row's tokens do not depend on what the rows beside it are. By rounding they may depend on how many there are:
    the products of few rows and of many are summed in different orders. In float32 that hardly ever shows. In
    bfloat16 it may where two tokens are nearly equally likely: with the C++ library between fewer than four rows
    and more (of a random model's rows about one in five within a hundred tokens), with PyTorch between any numbers.
    Where that matters, decode in float32.

    Args:
        model: The model, on its device and in the precision to decode in; it is not changed.
        compile: Compile the step if this machine can: as a C++ library for a dense model on a CPU, otherwise with
            torch.compile, which is not used with ``int8``.
        int8: Store the matrices as int8 with a scale per row, a quarter of float32's bytes and slightly less exact.
            Prompts that PyTorch reads (all without the C++ library, else those longer than the window) use the model's
            own weights.

    Raises:
        UserError: The model has biases or an activation that the decoder does not support.
    """

    def __init__(self, model: DogeForCausalLM, compile: bool = True, int8: bool = False):
        self.model, self.config = model, model.config
        if self.config.attention_bias or self.config.mlp_bias or self.config.hidden_act != "silu":
            raise UserError(
                "The fast decoder supports only models without attention_bias and mlp_bias and with hidden_act 'silu', "
                "like all presets: use model.generate."
            )
        own = cast(Iterable[DogeDecoderLayer], model.model.layers)
        layers = [LayerWeights.of(layer, int8) for layer in own]
        table, projection = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
        embedding: torch.Tensor | Int8 = table
        head: torch.Tensor | Int8 = projection
        if int8:
            embedding = Int8.of(table)
            head = embedding if table.data_ptr() == projection.data_ptr() else Int8.of(projection)
        self._step: CpuStep | TorchStep
        if compile and CpuStep.supports(model, layers):
            self._step = CpuStep(model, layers, embedding, head)
        else:
            self._step = TorchStep(model, layers, embedding, head, compile and not int8)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        num_return_sequences: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Generate the tokens that follow each prompt, without the end token.

        Prompts may differ in length. A prompt that occurs several times is read once; the C++ library also reads a
        prefix that all prompts share once.

        Args:
            prompts: Token ids of each prompt, at least one each.
            max_new_tokens: Number of tokens after which a row ends at the latest.
            sampling: How a token is chosen; by default the likeliest is.
            num_return_sequences: Continuations of each prompt, consecutive in the result.
            eos_token_id: Token id, or several, that end a row; by default the model's. -1: no token does.

        Raises:
            UserError: There is no prompt, one is empty or has an id outside the vocabulary, or max_new_tokens is
                below 1.
        """
        if eos_token_id is None:
            eos_token_id = self.model.generation_config.eos_token_id
        ends = set(eos_token_id) if isinstance(eos_token_id, list | tuple) else {eos_token_id}
        rows: list[list[int]] = [[] for _ in range(len(prompts) * num_return_sequences)]
        running = set(range(len(rows)))
        for tokens in self.stream(prompts, max_new_tokens, sampling, num_return_sequences):
            found = tokens.tolist()
            running -= {row for row in running if found[row] in ends}
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
        """Yield the next tokens of all rows, (rows,) int64, step by step. As `generate`, but no token ends a row."""
        if not prompts or not all(prompts):
            raise UserError("A prompt is empty, or there is none: give prompts of at least one token each.")
        vocabulary = self.config.vocab_size
        if min(map(min, prompts)) < 0 or max(map(max, prompts)) >= vocabulary:
            raise UserError(
                f"A prompt has a token id outside 0 to {vocabulary - 1}: was it encoded with the model's tokenizer?"
            )
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
        device = self.model.device
        generator = sampling.generator(device)
        logits, slots, lengths = self._prefill(prompts, max_new_tokens, num_return_sequences)
        tokens = sampling.choose(logits, generator)
        yield tokens
        for number in range(max_new_tokens - 1):
            found = self._step(tokens, lengths + number, slots, greedy=not sampling.do_sample)
            tokens = sampling.choose(found, generator) if sampling.do_sample else found
            yield tokens

    def _prefill(self, prompts, max_new_tokens: int, repeats: int) -> tuple[torch.Tensor, list[Slots], torch.Tensor]:
        """Logits of the rows' next tokens, every layer's slots, and the number of tokens of each row."""
        different = list(dict.fromkeys(map(tuple, prompts)))
        needed = max(map(len, different)) + max_new_tokens
        logits, slots = self._step.prefill(different, -(-needed // SLOT_STEP) * SLOT_STEP)
        places = {prompt: place for place, prompt in enumerate(different)}
        rows = [places[tuple(prompt)] for prompt in prompts for _ in range(repeats)]
        index = torch.tensor(rows, device=self.model.device)
        if rows != list(range(len(different))):
            logits, slots = logits[index], [Slots(*(states[index] for states in layer)) for layer in slots]
        return logits, slots, torch.tensor([len(different[row]) for row in rows], device=self.model.device)
