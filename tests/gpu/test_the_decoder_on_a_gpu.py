"""On a GPU: packed prompts and the compiled step give the tokens that each prompt would get from `generate` alone."""

import pytest
import torch
from tiny_models import tiny_model, tokens

from doge.generation import Decoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("window", [2048, 16])
@pytest.mark.parametrize("moe", [False, True])
def test_rows_get_what_they_would_get_alone(moe, window):
    model = tiny_model(moe, window).cuda()
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 20, 11, 1)]
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    alone = [model.generate(torch.tensor([prompt]).cuda(), **settings)[0, len(prompt) :].tolist() for prompt in prompts]
    assert Decoder(model).generate(prompts, 24, eos_token_id=-1) == alone
