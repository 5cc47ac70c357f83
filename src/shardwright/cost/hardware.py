"""Published peak rates of devices, for MFU. A device that is not here gives "unknown", never a guess."""

from __future__ import annotations

# Dense 16-bit tensor-core FLOP/s, from the makers' data sheets; the longest name that fits wins.
_PEAK_BF16 = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops(device_name: str, dtype: str) -> float | str:
    """FLOP/s of one device, or the reason why it is unknown."""
    if dtype != "bf16":
        return f"unknown (MFU is stated for bf16, and this run computes {dtype})"
    fitting = [name for name in _PEAK_BF16 if device_name.startswith(name)]
    if not fitting:
        return f'unknown (no peak rate for "{device_name}")'
    return _PEAK_BF16[max(fitting, key=len)]


def mfu(flops_per_token: float, tokens_per_second: float, devices: int, peak: float | str) -> float | str:
    """Model FLOPs utilisation: what the model needs over what the devices could, or why it is unknown."""
    if isinstance(peak, str):
        return peak
    return flops_per_token * tokens_per_second / (devices * peak)
