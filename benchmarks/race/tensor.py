"""tp = 2 in both of its forms beside torch's tensor parallelism with sequence parallelism."""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Case
from benchmarks.peers.tensor import torch_tensor_parallel
from benchmarks.race.ours import shardwright, silent
from benchmarks.race.setting import Race, Setting, tokens_of

WORLD = 2


def races(setting: Setting) -> list[Race]:
    """One race; under bf16 the peer keeps no masters, or by hand."""
    plan = setting.plan(WORLD, tp=WORLD)
    make = partial(torch_tensor_parallel, plan=plan, dtype=setting.dtype)
    cases = [Case("parallelize_module", setting.precision(masters=False), make)]
    if setting.dtype == "bf16":
        cases.append(Case("parallelize_module, masters", setting.precision(), partial(make, masters=True)))
    peers = tuple(case.name for case in cases)
    for name, sequence_parallel in (("sequence parallel", True), ("all-reduce form", False)):
        plan = setting.plan(WORLD, tp=WORLD, sequence_parallel=sequence_parallel)
        title, top = f"tp = 2, {name}", f"ceiling of {name}"
        cases.append(Case(title, setting.precision(), partial(shardwright, plan=plan), peers, top, batch=True))
        cases.append(Case(top, setting.precision(), partial(silent, plan=plan), batch=True, bound=True))
    return [Race("tp", "tp = 2, two ranks", WORLD, tokens_of(plan), cases)]
