"""What is known of this machine without torch."""

from __future__ import annotations

import pytest
import torch

from shardwright.comm.machine import computes_bf16
from shardwright.plan.machine import cpu_computes_bf16, num_cores, num_gpus


def test_it_agrees_with_what_ranks_see(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_cores() >= 1
    assert cpu_computes_bf16() == computes_bf16("cpu")
    assert num_gpus() >= torch.cuda.device_count()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert num_gpus() == 0
