import importlib
import inspect
import json
import time
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_runs import SimulatedRun

from cluster.accounts.ledger import DriverStarted, Ledger, LedgerRecipe, StepRecord, WorkEnded
from cluster.accounts.timeline import KINDS, MAX_BINS, Kind
from cluster.elastic.events import HostJoined, HostLeft, MembershipFormed
from doge.common.errors import UserError
from doge.reporting.plots import plot_lanes

PRICES = LedgerRecipe({"GPU": 2.0, "GPU 16": 3.6})


def step(host="a", membership=1, number=1, ended=0.0, node="n1", device="CPU (1 threads)", energy=None, **seconds):
    return StepRecord(host, node, device, membership, number, ended, seconds, 4, energy)


def formed(number: int, from_step: int, at: float) -> MembershipFormed:
    return MembershipFormed(number, at, 1, from_step, from_step, 0.0, None)


def spent(ledger: Ledger, host: str = "a") -> dict[str, float]:
    workers = {worker.host: worker for worker in ledger.figures(LedgerRecipe()).workers}
    return {kind: round(seconds, 6) for kind, seconds in workers[host].seconds_of.items()}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), workers=st.integers(1, 6), kill=st.sampled_from([None, 20.0, 60.0]))
def test_the_kinds_of_a_workers_time_add_up_to_its_stay(seed, workers, kill):
    run = SimulatedRun(seed, [16.0] * workers, kill_seconds=kill)
    run.run(150.0)
    figures = run.ledger.figures(LedgerRecipe())
    for worker in figures.workers:
        assert sum(worker.seconds_of.values()) == pytest.approx(worker.seconds)
    assert sum(figures.shares.values()) == pytest.approx(1)
    timeline = run.ledger.timeline()
    shares = [share for lane in timeline.lanes for bins in lane.shares.values() for share in bins.values()]
    in_bins = timeline.bin_seconds * sum(shares)
    assert in_bins == pytest.approx(sum(worker.seconds for worker in figures.workers))


def test_what_no_record_speaks_of_is_start_restart_or_idle():
    ledger = Ledger(8, 1)
    ledger.take(HostJoined("a", "n1", 100.0))
    ledger.take(HostJoined("b", "n1", 100.0))
    ledger.take(formed(1, 0, 101.0))
    ledger.take(step("a", 1, 1, ended=110.0, data=1.0, step=3.0))
    ledger.take(step("b", 1, 1, ended=110.0, data=1.0, step=3.0))
    ledger.take(step("a", 1, 2, ended=114.0, step=3.0))
    ledger.take(HostLeft("b", 115.0))
    ledger.take(formed(2, 1, 116.0))
    ledger.take(step("a", 2, 2, ended=125.0, step=4.0))
    ledger.take(step("a", 2, 3, ended=129.0, step=4.0))
    ledger.take(WorkEnded(131.0))
    assert spent(ledger) == {"start": 6, "data": 1, "step": 10, "idle": 3, "restart": 7, "repeated": 4}
    assert spent(ledger, "b") == {"start": 6, "data": 1, "step": 3, "restart": 5}
    figures = ledger.figures(LedgerRecipe())
    assert (figures.steps, figures.lost_steps, figures.restarts, figures.restart_seconds) == (3, 1, 1, 7.0)
    assert figures.wall_seconds == 31


def test_a_record_told_twice_late_or_of_strangers_does_no_harm():
    ledger = Ledger(4, 1)
    ledger.take(step("a", 7, 5, ended=50.0, step=2.0))
    ledger.take(step("a", 7, 5, ended=50.0, step=2.0))
    ledger.take(HostLeft("a", 55.0))
    ledger.take(formed(8, 6, 55.0))
    ledger.take(step("a", 7, 6, ended=53.0, step=2.5))  # posted before its death, handed on after
    ledger.take(step("b", 8, 7, ended=60.0, step=9.0))  # longer than b has been there: not more than its stay
    figures = ledger.figures(LedgerRecipe())
    assert (figures.steps, figures.lost_steps) == (3, 0)
    assert spent(ledger) == {"step": 4.5, "idle": 0.5, "restart": 2}
    assert [worker.tokens for worker in figures.workers] == [8, 4]


def test_another_driver_adds_on_and_the_time_between_does_not_count():
    first = SimulatedRun(1, [16, 8], kill_seconds=40.0)
    first.run(120.0)
    before = first.ledger.figures(PRICES)
    ledger = Ledger.from_dict(json.loads(json.dumps(first.ledger.to_dict())))
    assert ledger.figures(PRICES) == before
    second = SimulatedRun(2, [16, 8], ledger=ledger, clock=3.0, highest=first.highest)  # a machine just booted
    second.run(60.0)
    after = ledger.figures(PRICES)
    alone = SimulatedRun(2, [16, 8], clock=3.0, highest=first.highest)
    alone.run(60.0)
    own = alone.ledger.figures(PRICES)
    assert after.wall_seconds == pytest.approx(before.wall_seconds + own.wall_seconds)
    assert after.cost == pytest.approx(before.cost + own.cost)
    assert after.energy_kwh == pytest.approx(before.energy_kwh + own.energy_kwh)
    assert after.tokens == second.highest * ledger.tokens_per_step
    assert after.lost_steps >= before.lost_steps + first.highest % first.save_steps
    assert ledger.timeline().gaps == [before.wall_seconds]


def test_a_ledger_that_is_written_and_read_in_between_is_the_same_ledger():
    whole, parts = SimulatedRun(5, [16, 8], kill_seconds=30.0), SimulatedRun(5, [16, 8], kill_seconds=30.0)
    parts.ledger = Rewritten(parts.ledger)
    whole.run(100.0)
    parts.run(100.0)
    assert parts.ledger.ledger.figures(PRICES) == whole.ledger.figures(PRICES)


class Rewritten:
    """A ledger that goes through its file after every event."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    def take(self, event) -> None:
        self.ledger.take(event)
        self.ledger = Ledger.from_dict(json.loads(json.dumps(self.ledger.to_dict())))


def test_what_a_driver_did_after_it_wrote_its_ledger_last_is_not_guessed():
    run = SimulatedRun(1, [16, 8])
    run.run(100.0)
    ledger = Ledger.from_dict(json.loads(json.dumps(run.ledger.to_dict())))
    later = run.highest + 40 - run.highest % 20  # a commit of which the ledger did not hear
    SimulatedRun(2, [16, 8], ledger=ledger, clock=3.0, highest=later).run(60.0)
    figures = ledger.figures(PRICES)
    assert figures.lost_steps == 0
    alone = SimulatedRun(2, [16, 8], clock=3.0, highest=later)
    alone.run(60.0)
    assert figures.steps == run.highest + alone.highest - later
    assert 0.85 < figures.goodput < 1


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch):
    calm = SimulatedRun(3, [16, 8], kill_seconds=30.0)
    calm.run(100.0)
    jumps = iter(range(0, -(10**9), -3600))
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, lambda: next(jumps))
    jumping = SimulatedRun(3, [16, 8], kill_seconds=30.0)
    jumping.run(100.0)
    monkeypatch.undo()
    assert jumping.ledger.to_dict() == calm.ledger.to_dict()
    for name in ("ledger", "goodput", "figures", "host_account", "membership_times", "timeline"):
        module = importlib.import_module(f"cluster.accounts.{name}")
        assert "import time" not in inspect.getsource(module)
        assert "datetime" not in inspect.getsource(module)


def test_its_memory_does_not_grow_with_the_steps():
    sizes = []
    for steps in (4_000, 16_000):
        ledger = Ledger(8, 1)
        for number in range(1, steps + 1):
            for host in "ab":
                ledger.take(step(host, 1, number, ended=number * 0.9, data=0.1, step=0.5, others=0.2))
        sizes.append(len(json.dumps(ledger.to_dict())))
        assert max(max(bins) for lane in ledger.timeline().lanes for bins in lane.shares.values()) < MAX_BINS
    assert sizes[1] < 2 * sizes[0] < 1_000_000


def many_changes(memberships: int, kinds: int) -> Ledger:
    """One of three hosts after another leaves for a new one, on four nodes with devices of some kinds."""
    ledger, at, hosts = Ledger(8, 1), 0.0, []
    for number in range(1, memberships + 1):
        device = f"GPU {number * 7 % kinds}"
        ledger.take(HostJoined(f"host-{number}", f"node-{number % 4}", at))
        hosts.append((f"host-{number}", f"node-{number % 4}", device))
        if len(hosts) > 3:
            ledger.take(HostLeft(hosts.pop(0)[0], at))
        ledger.take(formed(number, 4 * number, at))
        for made in range(1, 5):
            for host, node, known in hosts:
                end = at + 2.0 + made
                ledger.take(step(host, number, 4 * number + made, end, node, known, data=0.2, step=0.5, others=0.3))
        at += 7.0
    return ledger


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [1, 12])
def test_its_memory_does_not_grow_with_the_memberships_and_hosts_that_ever_were(kinds, monkeypatch):
    monkeypatch.setattr("cluster.accounts.goodput._MOST_SUMS", 60)
    monkeypatch.setattr("cluster.accounts.timeline.MAX_BINS", 100)
    few, many = many_changes(1600, kinds), many_changes(3200, kinds)
    sizes = [len(json.dumps(ledger.to_dict())) for ledger in (few, many)]
    assert sizes[1] < 1.1 * sizes[0]
    assert many.figures(PRICES).restarts == 3199
    assert many.timeline().changes == 3199
    assert many.figures(PRICES).steps == 3200 * 4
    workers = many.figures(PRICES).workers
    assert len(workers) <= 32 + 3 + 4 * 2 * kinds
    assert sum(worker.tokens for worker in workers) == (3 * 3200 - 3) * 4 * 4
    assert "host-1 … host-" in workers[0].host


@pytest.mark.parametrize("seed", range(8))
def test_what_is_over_counts_in_the_sums_as_it_did_apart(seed, monkeypatch):
    def run():
        simulated = SimulatedRun(seed, [16, 16, 8], kill_seconds=40.0)
        simulated.run(600.0)
        return simulated.ledger

    monkeypatch.setattr("cluster.accounts.ledger._MEMBERSHIPS_KEPT", 10**6)
    monkeypatch.setattr("cluster.accounts.ledger._DEPARTED_KEPT", 10**6)
    apart = run().figures(PRICES)
    monkeypatch.setattr("cluster.accounts.ledger._MEMBERSHIPS_KEPT", 8)
    monkeypatch.setattr("cluster.accounts.ledger._DEPARTED_KEPT", 2)
    ledger = run()
    summed = ledger.figures(PRICES)
    assert len(summed.workers) < len(apart.workers)
    assert sum(len(lane.shares) > 0 for lane in ledger.timeline().lanes) <= 5
    for name in ("goodput", "steps", "lost_steps", "restarts", "restart_seconds", "tokens", "cost", "energy_kwh"):
        assert getattr(summed, name) == pytest.approx(getattr(apart, name)), name
    assert summed.lost == pytest.approx(apart.lost)
    assert summed.shares == pytest.approx(apart.shares)


def test_a_record_of_a_membership_long_over_changes_nothing(monkeypatch):
    monkeypatch.setattr("cluster.accounts.ledger._MEMBERSHIPS_KEPT", 2)
    ledger = many_changes(6, 1)
    before = ledger.to_dict()
    ledger.take(step("host-1", 1, 30, ended=40.0, step=1.0))
    assert ledger.to_dict() == before


def test_cost_is_hours_times_price_and_a_device_without_one_is_named():
    ledger = Ledger(8, 1)
    ledger.take(HostJoined("a", "n1", 0.0))
    ledger.take(step("a", ended=1800.0, device="NVIDIA GeForce RTX 4090", energy=1.8e6, step=1800.0))
    ledger.take(step("b", ended=3600.0, device="NVIDIA GeForce RTX 4090 D", step=1800.0))
    ledger.take(step("c", ended=3600.0, device="CPU (8 threads)", step=3600.0))
    ledger.take(WorkEnded(3600.0))
    prices = LedgerRecipe({"rtx 4090": 0.4, "RTX 4090 D": 0.2, "4090": 9.0}, "€", electricity_per_kwh=0.3)
    figures = ledger.figures(prices)
    assert figures.workers[0].cost == pytest.approx(1.0 * 0.4 + 0.5 * 0.3)
    assert figures.cost == pytest.approx(0.55 + 0.5 * 0.2)
    assert figures.unpriced == ["CPU (8 threads)"]
    rows = dict(figures.rows())
    assert rows["cost"] == "€0.65, without these: no price for CPU (8 threads): set ledger.prices_per_hour"
    assert rows["energy"] == "0.5 kWh by 1 of 3 workers; the rest is unknown"
    assert dict(ledger.figures(LedgerRecipe()).rows())["cost"].startswith("unknown, no price for CPU (8 threads), NV")


def test_the_cpu_hosts_of_a_node_share_its_one_counter():
    ledger = Ledger(8, 1)
    for host in "ab":
        ledger.take(HostJoined(host, "n1", 0.0))
        ledger.take(HostJoined(host.upper(), "n1", 0.0))
    for host in "ab":
        ledger.take(step(host, ended=5.0, step=5.0))  # only its records tell what a host's device is
    for host in "ab":
        ledger.take(step(host, number=2, ended=10.0, energy=100.0, step=5.0))
        ledger.take(step(host.upper(), ended=10.0, device="NVIDIA H100", energy=700.0, step=10.0))
    assert ledger.figures(LedgerRecipe()).energy_kwh == pytest.approx((100 + 2 * 700) / 3.6e6)


@pytest.mark.parametrize("price", [-1.0, float("inf"), float("nan")])
def test_a_price_that_is_none_is_one_sentence(price):
    with pytest.raises(UserError, match=r"ledger\.prices_per_hour\.H100 must be finite and not negative"):
        LedgerRecipe({"H100": price})
    with pytest.raises(UserError, match=r"ledger\.electricity_per_kwh"):
        LedgerRecipe(electricity_per_kwh=price)


def test_figures_are_told_to_a_person_and_to_mlflow():
    run = SimulatedRun(11, [16, 16, 8], kill_seconds=60.0)
    run.run(200.0)
    figures = run.ledger.figures(PRICES)
    rows, metrics = dict(figures.rows()), figures.metrics()
    assert rows["goodput"].startswith(f"{figures.goodput:.1%} of the tokens of an undisturbed run")
    assert rows["lost steps"].startswith(f"{figures.lost_steps} made again after {figures.restarts} restarts of ")
    assert {"on node-0", "on node-1"} < rows.keys()
    assert metrics["ledger/goodput"] == figures.goodput
    assert metrics["ledger/busy_share"] == metrics["ledger/share/step"] == figures.busy_share
    assert metrics["ledger/tokens/node-1"] == sum(worker.tokens for worker in figures.nodes["node-1"])
    assert all(isinstance(value, float) for value in metrics.values())


def test_a_run_of_no_step_has_figures_all_the_same():
    ledger = Ledger(8, 1)
    empty = ledger.figures(LedgerRecipe())
    assert (empty.goodput, empty.tokens, empty.cost, empty.energy_kwh) == (None, 0, None, None)
    ledger.take(DriverStarted(4.0))
    ledger.take(HostJoined("a", "n1", 5.0))
    ledger.take(WorkEnded(9.0))
    assert spent(ledger) == {"start": 4}
    assert ledger.figures(LedgerRecipe()).wall_seconds == 5
    assert dict(ledger.figures(LedgerRecipe()).rows())["goodput"] == "unknown: too few steps to tell"


def test_a_worker_that_comes_for_one_that_went_takes_its_lane(tmp_path):
    run = SimulatedRun(11, [16, 16, 16], kill_seconds=40.0)
    run.run(200.0)
    timeline = run.ledger.timeline()
    assert len(run.ledger.figures(LedgerRecipe()).workers) > 3
    assert len(timeline.lanes) <= 4  # a worker may be asked for before its predecessor's death is known
    assert sum(len(lane.hosts) for lane in timeline.lanes) == len(run.ledger.figures(LedgerRecipe()).workers)
    plot_lanes(tmp_path / "timeline.png", "test", **timeline.drawing())
    plot_lanes(tmp_path / "empty.png", "test", **Ledger(8, 1).timeline().drawing())
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


def test_every_kind_has_a_label_and_a_color():
    assert set(get_args(Kind)) == KINDS.keys()
