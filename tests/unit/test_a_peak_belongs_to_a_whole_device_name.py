"""The peak speed of a device is found by its whole name: a name that begins alike may be of another device."""

import pytest
import torch

from doge.common.hardware import peak_tflops

CUDA = torch.device("cuda")


@pytest.fixture
def named(monkeypatch):
    def peak(name):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return peak_tflops(CUDA)

    return peak


def test_variants_of_a_device_have_peaks_of_their_own(named):
    assert named("NVIDIA H100 80GB HBM3") == 989
    assert named("NVIDIA H100 PCIe") == 756
    assert named("NVIDIA H100 NVL") == 835.5
    assert (named("NVIDIA L4"), named("NVIDIA L40"), named("NVIDIA L40S")) == (121, 181, 362)
    assert (named("NVIDIA A10"), named("NVIDIA A10G"), named("NVIDIA A100-SXM4-40GB")) == (125, 70, 312)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA H20", "NVIDIA L400",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA A1000", "NVIDIA RTX A60000", "",
    ],
)  # fmt: skip
def test_a_device_that_is_not_known_has_no_peak(named, name):
    assert named(name) is None


def test_a_cpu_has_no_peak():
    assert peak_tflops(torch.device("cpu")) is None
