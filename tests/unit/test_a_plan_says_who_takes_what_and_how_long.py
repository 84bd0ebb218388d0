import pytest

from cluster.runs.forecast import devices_of_machine, forecast, known_speeds, remember_speeds
from cluster.runs.recipe import Recipe
from doge.common.config_tree import from_dict
from doge.common.storage import Storage

TRAINING = {"max_steps": 3600, "global_batch_size": 40, "micro_batch_size": 8}


def recipe(**changes) -> Recipe:
    values = {"data": {"sequence_length": 100}, "training": TRAINING, "scaling": {"num_workers": [1, 4]}}
    return from_dict(Recipe, values | changes)


def test_shares_time_and_cost_follow_measured_speeds():
    prices = {"ledger": {"prices_per_hour": {"4090": 0.5, "3060": 0.1}}}
    rows = dict(forecast(recipe(**prices), ["RTX 4090", "RTX 3060"], {"RTX 4090": 3000.0, "RTX 3060": 1000.0}))
    assert rows["workers"] == "1 × RTX 4090, 1 × RTX 3060"
    assert rows["shares"] == "30 + 10 sequences a step"
    assert rows["time"].startswith("about 1:00:00 at 4,000 tokens/s")
    assert rows["cost"].startswith("about $0.60")


def test_a_device_is_found_by_the_part_of_its_name_that_ray_knows():
    rows = dict(forecast(recipe(), ["H100"], {"NVIDIA H100 80GB HBM3": 4000.0}))
    assert rows["time"].startswith("about 1:00:00")
    assert rows["cost"] == "unknown, no price for H100: set ledger.prices_per_hour"


def test_without_an_earlier_run_the_time_is_unknown_and_says_so():
    rows = dict(forecast(recipe(), ["RTX 4090", "CPU (2 threads)"], {"RTX 4090": 3000.0}))
    assert rows["shares"] == "20 + 20 sequences a step, until the first steps show how fast each worker is"
    assert rows["time"] == "unknown before the first steps: no earlier run of this model on CPU (2 threads)"
    assert "cost" not in rows


def test_too_few_machines_are_named_with_what_the_run_would_do():
    patient = recipe(scaling={"num_workers": 2, "wait_timeout_s": 30})
    assert dict(forecast(patient, [], {})) == {
        "workers": "room for none now, 2 workers at least: the run waits 30 s for them"
    }
    hasty = recipe(scaling={"num_workers": 2, "wait_timeout_s": 0})
    assert dict(forecast(hasty, ["H100"], {}))["workers"].endswith("the run ends at once")


def test_speeds_are_remembered_for_the_same_model_only(tmp_path):
    storage = Storage(str(tmp_path))
    remember_speeds(recipe(), storage, {"H100": 10.0})
    remember_speeds(recipe(), storage, {"A100": 5.0})
    assert known_speeds(recipe(training={"global_batch_size": 8, "micro_batch_size": 8}), storage) == {
        "H100": 10.0,
        "A100": 5.0,
    }
    assert known_speeds(recipe(data={"sequence_length": 200}), storage) == {}


@pytest.mark.parametrize(("number", "expected"), [(None, 1), (1, 1), ([1, 2], 2)])
def test_a_machine_alone_has_one_worker_unless_more_are_asked_for(number, expected):
    assert len(devices_of_machine(recipe(scaling={"num_workers": number, "use_gpu": False}))) == expected
