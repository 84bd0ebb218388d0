from itertools import pairwise

import pytest
import torch

from doge.common.errors import UserError
from doge.training.optimizer import OptimizerRecipe
from doge.training.schedule import SchedulerRecipe


def test_warmup_stable_and_decay():
    schedule = SchedulerRecipe(warmup_steps=10, decay_steps=20)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:80] == [1.0] * 70
    assert factors[80:] == pytest.approx([(100 - step) / 21 for step in range(80, 100)])
    assert [schedule.is_stable(step, 100) for step in (9, 10, 79, 80)] == [False, True, True, False]


def test_a_decay_by_the_square_root_falls_fast_at_first_and_ends_at_zero():
    schedule = SchedulerRecipe(warmup_steps=10, decay_steps=24, decay_shape="1-sqrt")
    linear = SchedulerRecipe(warmup_steps=10, decay_steps=24)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[:76] == [linear.factor(step, 100) for step in range(76)]
    assert factors[76:] == pytest.approx([1 - (over / 25) ** 0.5 for over in range(1, 25)])
    assert schedule.factor(100, 100) == linear.factor(100, 100) == 0
    assert all(later < earlier for earlier, later in pairwise(factors[75:]))
    assert schedule.describe() == "10 steps of warm-up, 24 of decay to zero (1-sqrt)"
    assert linear.describe() == "10 steps of warm-up, 24 of decay to zero"


def test_the_stable_phase_can_be_left_at_any_step():
    schedule = SchedulerRecipe(warmup_steps=10, decay_steps=5)
    assert [schedule.factor(step, 1000) for step in range(45)] == [schedule.factor(step, 50) for step in range(45)]


def test_impossible_phases_are_refused():
    with pytest.raises(UserError, match="nor together exceed"):
        SchedulerRecipe(warmup_steps=60, decay_steps=60).check(100)


def test_norms_residual_weights_and_a_do_not_decay():
    from doge.model.configuration import ModelRecipe
    from doge.model.modeling import build_model

    model = build_model(ModelRecipe(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64).build())
    decayed, free = OptimizerRecipe(weight_decay=0.01).build(model).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    for parameter in free["params"]:
        assert "norm" in names[id(parameter)] or names[id(parameter)].endswith(("residual", "A")), names[id(parameter)]
    for parameter in decayed["params"]:
        assert names[id(parameter)].endswith("weight")
        assert "norm" not in names[id(parameter)]
    assert sum(map(len, (decayed["params"], free["params"]))) == len(names)
    assert isinstance(model, torch.nn.Module)
