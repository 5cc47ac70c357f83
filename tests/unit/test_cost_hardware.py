"""The table of devices, names, and MFU."""

from __future__ import annotations

import re

import pytest

from shardwright.cost.hardware import NAMES, hardware_named, mfu, peak_flops
from shardwright.errors import RecipeError
from shardwright.units import parse_bytes


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_sane(name: str) -> None:
    row = hardware_named(name)
    sold = parse_bytes(re.findall(r"\d+ GB", row.sold)[-1])
    # What a maker calls GB are GiB in some rows; nobody leaves more of them than there are, nor much less.
    assert 0.95 * sold < row.usable < 1.074 * sold
    assert 10e12 < row.peak_bf16 < 3e15 and 0.2e12 < row.memory_rate < 10e12
    assert row.network is None or row.network < row.link
    assert "data sheet" in row.source


def test_names_are_found_in_either_case() -> None:
    assert hardware_named("h100-sxm") is hardware_named("H100_SXM")
    assert hardware_named("a100-80gb").usable == round(79.15 * 2**30)


@pytest.mark.parametrize(
    ("asked", "way_out"),
    [
        ("h100", "did you mean H100-SXM, H100-PCIe or H100-NVL?"),
        ("a100-80g", "did you mean A100-80GB?"),
        ("H1000-SXM", "did you mean H100-SXM, H100-NVL or H200?"),
        ("TPU", f"one of: {', '.join(NAMES)}"),
        ("", f"one of: {', '.join(NAMES)}"),
    ],
)
def test_an_unknown_name_gives_the_nearest(asked: str, way_out: str) -> None:
    with pytest.raises(RecipeError) as caught:
        hardware_named(asked)
    assert str(caught.value) == f'--hardware: no device is named "{asked}"\n  {way_out}'


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_peak_rates_by_the_driver_s_name(device: str, peak: float) -> None:
    assert peak_flops(device, "bf16") == peak


@pytest.mark.parametrize("device", ["NVIDIA FOO", "NVIDIA L40", "NVIDIA A10", "Tesla V100-SXM2-32GB", "cpu"])
def test_no_peak_rate_is_guessed(device: str) -> None:
    assert peak_flops(device, "bf16") == f'unknown (no peak rate for "{device}")'


def test_mfu() -> None:
    assert mfu(6e9, 1e5, 2, 1e15) == pytest.approx(0.3)
    reason = peak_flops("NVIDIA H100", "fp32")
    assert reason == "unknown (MFU is stated for bf16, and this run computes fp32)"
    assert mfu(6e9, 1e5, 2, reason) == reason
