"""What can be known of this machine without torch."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from shardwright.units import Bytes


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_gpus() -> int:
    """GPUs that the NVIDIA driver knows and CUDA_VISIBLE_DEVICES leaves; torch, where it is there, may find fewer."""
    folder = Path("/proc/driver/nvidia/gpus")
    count = len(list(folder.iterdir())) if folder.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([name for name in visible.split(",") if name.strip()]))


def available_memory() -> Bytes | None:
    """Host memory that can be had without swapping, as Linux estimates it; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return Bytes(int(found[0][1]) * 1024) if found else None


def cpu_computes_bf16() -> bool:
    """Whether this CPU has units made for bf16 matrix products: AMX or AVX512-BF16."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@cache
def fp32_products_by_onednn() -> bool:
    """Whether fp32 matrix products are faster by oneDNN than by MKL: the CPU has AVX-512 without AMX and is not
    Intel's, so that MKL keeps to AVX2 (see nn/product.py)."""
    try:
        found = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return not found & {"GenuineIntel", "amx_tile"} and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= found
