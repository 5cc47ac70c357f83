"""Devices by name: memory, peak rates and links, each with its source; MFU. An unknown device is never guessed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from shardwright.errors import RecipeError
from shardwright.units import Bytes

_GB, _GIB = 1e9, 2**30

_DATA_SHEET = "the maker's data sheet"
_IB200 = 25 * _GB
_IB400 = 50 * _GB


@dataclass(frozen=True)
class Hardware:
    """One kind of device in the node that it is usually sold in.

    `sold` is the memory as the maker writes it. `usable` is what the driver leaves to processes, as torch reports it
    (`total_memory`); out of it also come CUDA's context, NCCL's buffers and what fragmentation loses. `peak_bf16` is
    dense 16-bit tensor FLOP/s; `native_bf16` whether these are bf16 too. Rates are bytes/s; those of links are of one
    device in one direction, `link` inside a node and `network` between nodes, None where a node of these has no usual
    one. `driver_name` is the beginning of the name that drivers report. `source` says where the figures were read.
    """

    name: str
    driver_name: str
    sold: str
    usable: Bytes
    peak_bf16: float
    memory_rate: float
    link: float
    network: float | None
    gpus_per_node: int
    source: str
    native_bf16: bool = True


def _gib(count: float) -> Bytes:
    return Bytes(round(count * _GIB))


# `link` is NVLink (half of the bidirectional figure that data sheets give) or, where a row says so, PCIe. `usable` is
# from torch's messages in public issues and logs, except where the source says "usable from memory".
_TABLE = (
    Hardware(
        "V100-16GB", "Tesla V100-SXM2-16GB", "16 GB", _gib(15.77), 125e12, 0.9e12, 150 * _GB, 12.5 * _GB, 8,
        f"{_DATA_SHEET}; NVLink and EDR from the ZeRO paper (arXiv 1910.02054); memory's rate and usable from memory",
        native_bf16=False,
    ),
    Hardware(
        "V100-32GB", "Tesla V100-SXM", "32 GB", _gib(31.74), 125e12, 0.9e12, 150 * _GB, 12.5 * _GB, 8,
        f"{_DATA_SHEET}; NVLink and EDR from the ZeRO paper (arXiv 1910.02054); memory's rate and usable from memory",
        native_bf16=False,
    ),
    Hardware(
        "A100-40GB", "NVIDIA A100-SXM4-40GB", "40 GB", _gib(39.39), 312e12, 1.555e12, 300 * _GB, _IB200, 8,
        f"{_DATA_SHEET}; network: a DGX A100's eight HDR adapters; memory's rate and usable from memory",
    ),
    Hardware(
        "A100-80GB", "NVIDIA A100", "80 GB", _gib(79.15), 312e12, 2.039e12, 300 * _GB, _IB200, 8,
        f"{_DATA_SHEET}; network: a DGX A100's eight HDR adapters (arXiv 2104.04473); usable from torch's messages",
    ),
    Hardware(
        "H100-SXM", "NVIDIA H100", "80 GB", _gib(79.18), 989e12, 3.35e12, 450 * _GB, _IB400, 8,
        f"{_DATA_SHEET}; network: 400 Gb/s for each GPU (arXiv 2407.21783); usable from torch's messages",
    ),
    Hardware(
        "H100-PCIe", "NVIDIA H100 PCIe", "80 GB", _gib(79.18), 756e12, 2.0e12, 64 * _GB, _IB200, 8,
        f"{_DATA_SHEET}; link: PCIe 5 x16; network from memory; usable as of the SXM form",
    ),
    Hardware(
        "H100-NVL", "NVIDIA H100 NVL", "94 GB", _gib(93.0), 835e12, 3.9e12, 64 * _GB, _IB200, 8,
        f"{_DATA_SHEET}, from memory; link: PCIe 5 x16, pairs have NVLink; network and usable from memory",
    ),
    Hardware(
        "H200", "NVIDIA H200", "141 GB", _gib(139.8), 989e12, 4.8e12, 450 * _GB, _IB400, 8,
        f"{_DATA_SHEET}; NVLink and network from memory; usable from torch's messages",
    ),
    Hardware(
        "B200", "NVIDIA B200", "192 GB, 180 GB of them enabled", _gib(178.35), 2250e12, 8.0e12, 900 * _GB, _IB400, 8,
        f"{_DATA_SHEET}; network from memory; usable from torch's messages",
    ),
    Hardware(
        "GB200", "NVIDIA GB200", "192 GB, 186 GB of them enabled", _gib(184.0), 2500e12, 8.0e12, 900 * _GB, _IB400, 72,
        f"{_DATA_SHEET}; a node is the NVLink domain of 72; network and usable from memory",
    ),
    Hardware(
        "MI300X", "AMD Instinct MI300X", "192 GB", _gib(191.5), 1307e12, 5.3e12, 448 * _GB, _IB400, 8,
        f"{_DATA_SHEET}; link: seven of 64 GB/s, from memory, as are network and usable",
    ),
    Hardware(
        "L4", "NVIDIA L4", "24 GB", _gib(22.03), 121e12, 0.3e12, 32 * _GB, None, 8,
        f"{_DATA_SHEET}, from memory; link: PCIe 4 x16; usable from memory",
    ),
    Hardware(
        "L40S", "NVIDIA L40S", "48 GB", _gib(44.39), 362e12, 0.864e12, 32 * _GB, None, 8,
        f"{_DATA_SHEET}, from memory; link: PCIe 4 x16; usable from torch's messages",
    ),
    Hardware(
        "A10G", "NVIDIA A10G", "24 GB", _gib(22.06), 70e12, 0.6e12, 32 * _GB, None, 8,
        f"{_DATA_SHEET}, from memory; link: PCIe 4 x16; usable from memory",
    ),
    Hardware(
        "RTX-4090", "NVIDIA GeForce RTX 4090", "24 GB", _gib(23.64), 165e12, 1.008e12, 32 * _GB, None, 8,
        f"{_DATA_SHEET}, from memory; link: PCIe 4 x16 through the host; usable from torch's messages",
    ),
)  # fmt: skip

NAMES = tuple(hardware.name for hardware in _TABLE)


def hardware_named(name: str) -> Hardware:
    """The row of a name, in letters of either case. Raises RecipeError with the nearest names."""
    rows = {_plain(hardware.name): hardware for hardware in _TABLE}
    if found := rows.get(_plain(name)):
        return found
    begins = [hardware.name for hardware in _TABLE if _plain(hardware.name).startswith(_plain(name) or "?")]
    close = [rows[key].name for key in get_close_matches(_plain(name), rows, n=3, cutoff=0.5)]
    near = _together(begins or close)
    raise RecipeError(
        f'--hardware: no device is named "{name}"', f"did you mean {near}?" if near else f"one of: {', '.join(NAMES)}"
    )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _together(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def peak_flops(device_name: str, dtype: str) -> float | str:
    """FLOP/s of one device by the name that its driver reports, or the reason why it is unknown."""
    if dtype != "bf16":
        return f"unknown (MFU is stated for bf16, and this run computes {dtype})"
    fitting = [hardware for hardware in _TABLE if _is_called(hardware, device_name) and hardware.native_bf16]
    if not fitting:
        return f'unknown (no peak rate for "{device_name}")'
    return max(fitting, key=lambda hardware: len(hardware.driver_name)).peak_bf16


def _is_called(hardware: Hardware, device_name: str) -> bool:
    """Whether a driver's name begins with the row's, up to the end of a word: an L4 is not an L40."""
    begin, rest = hardware.driver_name, device_name[len(hardware.driver_name) :]
    return device_name.startswith(begin) and not rest[:1].isalnum()


def mfu(flops_per_token: float, tokens_per_second: float, devices: int, peak: float | str) -> float | str:
    """Model FLOPs utilisation: what the model needs over what the devices could, or why it is unknown."""
    if isinstance(peak, str):
        return peak
    return flops_per_token * tokens_per_second / (devices * peak)
