"""dp 2 x tp 2 x pp 2 on 8 ranks beside FSDP2 + parallelize_module + Schedule1F1B."""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Case
from benchmarks.peers.three_d import three_d
from benchmarks.race.ours import shardwright, silent
from benchmarks.race.setting import Race, Setting, tokens_of

WORLD, MICROBATCHES = 8, 4


def races(setting: Setting) -> list[Race]:
    """One race. Eight ranks share the cores of this machine, so that one that waits gives way to another: the ceiling
    is what all of them compute."""
    parallel = {"tp": 2, "pp": 2, "pipeline_schedule": "1f1b"}
    plans = {
        f"2 x 2 x 2, zero = {zero}": setting.plan(
            WORLD, micro_batches=MICROBATCHES, micro_batch=1, zero=zero, **parallel
        )
        for zero in (1, 3)
    }
    first = next(iter(plans.values()))
    peer = "FSDP2 + parallelize_module + Schedule1F1B"
    make = partial(three_d, plan=first, split=first.layers_per_stage, dtype=setting.dtype)
    cases = [Case(peer, setting.precision(), make)]
    for title, plan in plans.items():
        top = f"ceiling of {title}"
        cases.append(Case(title, setting.precision(), partial(shardwright, plan=plan), (peer,), top, batch=True))
        cases.append(Case(top, setting.precision(), partial(silent, plan=plan), batch=True, bound=True))
    title = f"dp 2 x tp 2 x pp 2, {MICROBATCHES} microbatches, eight ranks on the cores of one machine"
    return [Race("3d", title, WORLD, tokens_of(first), cases)]
