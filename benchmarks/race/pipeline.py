"""pp = 2 with 8 microbatches of one sequence, all schedules, beside torch.distributed.pipelining.

The peers run with the even split that is usually written and with the balanced one, which counts the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks.ceiling import ceiling
from benchmarks.harness import Case
from benchmarks.peers.pipelining import torch_pipeline
from benchmarks.race.ours import shardwright
from benchmarks.race.setting import Race, Setting, tokens_of
from shardwright.plan.plan import Plan

WORLD, MICROBATCHES = 2, 8
CEILING = "ceiling of 1f1b"
Split = tuple[int, ...]


def _plan(setting: Setting, schedule: str, stages: Split = (), grad_dtype: str = "") -> Plan:
    """On 2 stages, or on 4 where ranks have two; balanced unless told."""
    parallel = {
        "pp": WORLD,
        "pipeline_schedule": schedule,
        "virtual_stages": 2 if schedule in ("interleaved", "zbv") else 1,
        "stages": list(stages) if stages else "auto",
    }
    return setting.plan(WORLD, micro_batches=MICROBATCHES, micro_batch=1, grad_dtype=grad_dtype, **parallel)


def _shown(split: Sequence[int]) -> str:
    """Layers of each stage: 5 + 3."""
    return " + ".join(str(layers) for layers in split)


def races(setting: Setting) -> list[Race]:
    """One race: peers first, ours, and the ceiling."""
    balanced = _plan(setting, "1f1b")
    layers = balanced.architecture.layers
    even = (layers // 2, layers - layers // 2)
    peers = {}
    for schedule in ("1f1b", "gpipe", "zb-h1", "interleaved", "zbv"):
        chosen = _plan(setting, schedule).layers_per_stage
        for split in dict.fromkeys([even, chosen] if schedule in ("1f1b", "gpipe") else [chosen]):
            make = partial(torch_pipeline, plan=balanced, schedule=schedule, split=split, dtype=setting.dtype)
            name = f"torch {schedule}, {_shown(split)}"
            peers[name] = Case(name, setting.precision(masters=False), make)
    first, with_masters, ours = f"torch 1f1b, {_shown(even)}", f"torch 1f1b, {_shown(even)}, masters", {}
    if setting.dtype == "bf16":
        make = partial(torch_pipeline, plan=balanced, schedule="1f1b", split=even, dtype=setting.dtype, masters=True)
        peers[with_masters] = Case(with_masters, setting.precision(), make)
    plans = [_plan(setting, "1f1b", even), *(_plan(setting, s) for s in ("1f1b", "gpipe", "zb-h1"))]
    plans += [_plan(setting, schedule) for schedule in ("interleaved", "zbv")]
    for plan in plans:
        title = f"{plan.spec.parallel.pipeline_schedule}, {_shown(plan.layers_per_stage)}"
        beside = tuple(name for name in dict.fromkeys([f"torch {title}", first, with_masters]) if name in peers)
        make = partial(shardwright, plan=plan)
        ours[title] = Case(title, setting.precision(), make, beside, CEILING, batch=True)
    top = Case(CEILING, setting.precision(), partial(ceiling, plan=balanced), batch=True, modelled=True, bound=True)
    cases = [*peers.values(), *ours.values(), top]
    return [Race("pp", f"pp = 2, {MICROBATCHES} microbatches, two ranks", WORLD, tokens_of(balanced), cases)]
