import sys
from types import SimpleNamespace

import pytest
import torch

from doge.common import hardware

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh():
    hardware._energy_counter.cache_clear()
    yield
    hardware._energy_counter.cache_clear()


class NVMLError(Exception):
    pass


def fake_nvml(monkeypatch, joules: dict[str, float], error: str | None = None) -> None:
    """A machine of GPUs by UUID; ``error`` names the NVML function that fails."""

    def failing(function):
        def call(*arguments):
            if function.__name__ == error:
                raise NVMLError(error)
            return function(*arguments)

        return call

    def nvmlInit():
        pass

    def nvmlDeviceGetHandleByUUID(uuid):
        if uuid not in joules:
            raise NVMLError("not found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(handle):
        return int(joules[handle] * 1000)

    functions = (nvmlInit, nvmlDeviceGetHandleByUUID, nvmlDeviceGetTotalEnergyConsumption)
    module = SimpleNamespace(NVMLError=NVMLError, **{f.__name__: failing(f) for f in functions})
    monkeypatch.setitem(sys.modules, "pynvml", module)
    # CUDA_VISIBLE_DEVICES=1,0: torch's first GPU is the machine's second.
    uuids = {0: "second", 1: "first"}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device.index or 0])
    )


def test_a_gpu_is_found_by_its_uuid_whatever_its_number(monkeypatch):
    joules = {"GPU-first": 100.0, "GPU-second": 5.5}
    fake_nvml(monkeypatch, joules)
    assert hardware.energy_joules(torch.device("cuda", 0)) == 5.5
    assert hardware.energy_joules(torch.device("cuda", 1)) == 100.0
    joules["GPU-second"] = 7.0
    assert hardware.energy_joules(torch.device("cuda", 0)) == 7.0


@pytest.mark.parametrize("error", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_a_gpu_that_cannot_be_read_is_unknown(monkeypatch, error):
    fake_nvml(monkeypatch, {"GPU-second": 1.0}, error)
    assert hardware.energy_joules(torch.device("cuda", 0)) is None


def test_without_the_package_it_is_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert hardware.energy_joules(torch.device("cuda", 0)) is None


def zone(folder, name, microjoules, end=1_000_000_000):
    folder.mkdir()
    (folder / "name").write_text(name + "\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{end}\n")
    return folder / "energy_uj"


def test_a_cpu_counts_its_packages_and_memory_across_the_counters_end(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "_POWERCAP", tmp_path)
    package = zone(tmp_path / "intel-rapl:0", "package-0", 990_000_000)
    other = zone(tmp_path / "intel-rapl:1", "package-1", 0)
    memory = zone(tmp_path / "intel-rapl:0:1", "dram", 5_000_000)
    part = zone(tmp_path / "intel-rapl:0:0", "core", 0)
    platform = zone(tmp_path / "intel-rapl:2", "psys", 0)
    before = hardware.energy_joules(CPU)
    package.write_text("10000000")  # 20 J on, begun again at 1,000 J
    other.write_text("3000000")
    memory.write_text("6000000")
    part.write_text("999")
    platform.write_text("999")
    assert hardware.energy_joules(CPU) - before == pytest.approx(20 + 3 + 1)
    package.unlink()
    assert hardware.energy_joules(CPU) is None


def test_a_cpu_without_a_readable_counter_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "_POWERCAP", tmp_path)
    assert hardware.energy_joules(CPU) is None
    hardware._energy_counter.cache_clear()
    zone(tmp_path / "intel-rapl:0", "package-0", 1).unlink()
    assert hardware.energy_joules(CPU) is None
