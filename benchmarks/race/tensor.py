"""tp = 2 in both of its forms beside torch's tensor parallelism with sequence parallelism."""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Case
from benchmarks.peers.tensor import torch_tensor_parallel
from benchmarks.race.ours import shardwright, silent
from benchmarks.race.setting import Race, Setting, tokens_of

WORLD = 2


def races(setting: Setting) -> list[Race]:
    """One race; the peer keeps no masters under bf16."""
    plan, peer = setting.plan(WORLD, tp=WORLD), "parallelize_module"
    make = partial(torch_tensor_parallel, plan=plan, dtype=setting.dtype)
    cases = [Case(peer, setting.precision(masters=False), make)]
    for name, sequence_parallel in (("sequence parallel", True), ("all-reduce form", False)):
        plan = setting.plan(WORLD, tp=WORLD, sequence_parallel=sequence_parallel)
        title, top = f"tp = 2, {name}", f"ceiling of {name}"
        cases.append(Case(title, setting.precision(), partial(shardwright, plan=plan), (peer,), top, batch=True))
        cases.append(Case(top, setting.precision(), partial(silent, plan=plan), batch=True, bound=True))
    return [Race("tp", "tp = 2, two ranks", WORLD, tokens_of(plan), cases)]
