import pytest
import torch

from doge.model.configuration import ModelRecipe, flops_per_token
from doge.training.next_token import NextTokenPrediction
from doge.training.objective import TensorBatch

MODEL = ModelRecipe("Doge-20M", keep_window_size=64)
OBJECTIVE = NextTokenPrediction(MODEL)


def batch(*documents: list[int]) -> TensorBatch:
    """Rows of documents of these lengths."""
    rows = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in documents])
    return TensorBatch({"input_ids": rows, "labels": rows, "position_ids": rows})


@pytest.mark.parametrize("lengths", [[256], [100, 100, 56], [1] * 256])
def test_each_document_counts_as_if_it_were_alone(lengths):
    expected = sum(length * flops_per_token(MODEL.build(), length) for length in lengths)
    assert OBJECTIVE.flops(batch(lengths)) == pytest.approx(expected)


def test_shares_of_a_batch_add_up_to_it():
    whole = batch([200, 56], [30, 226], [256])
    assert OBJECTIVE.flops(whole[:1]) + OBJECTIVE.flops(whole[1:]) == pytest.approx(OBJECTIVE.flops(whole))
    assert OBJECTIVE.flops(whole[:0]) == 0
