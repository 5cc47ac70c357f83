"""Data parallelism and ZeRO on two ranks, each stage beside those who keep the same things."""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Case
from benchmarks.peers import ddp, deepspeed, fsdp2
from benchmarks.race.ours import shardwright, silent
from benchmarks.race.setting import Race, Setting, tokens_of

WORLD = 2


def _ours(setting: Setting, zero: int, peers: tuple[str, ...], grad_dtype: str = "") -> list[Case]:
    plan = setting.plan(WORLD, zero=zero, grad_dtype=grad_dtype)
    precision = setting.precision(grad_dtype=grad_dtype)
    suffix = f", {grad_dtype} gradients" if grad_dtype else ""
    name, top = f"zero-{zero}{suffix}", f"ceiling of zero-{zero}{suffix}"
    return [
        Case(name, precision, partial(shardwright, plan=plan), peers, top, batch=True),
        Case(top, precision, partial(silent, plan=plan), batch=True, bound=True),
    ]


def _ddp(setting: Setting) -> list[Case]:
    """DDP in the ways in which its users choose between speed and exactness."""
    plan = setting.plan(WORLD)
    if setting.dtype == "fp32":
        return [Case("DDP", setting.precision(), partial(ddp.ddp, plan=plan, dtype="fp32"))]
    return [
        Case("DDP bf16", setting.precision(masters=False), partial(ddp.ddp, plan=plan, dtype="bf16")),
        Case("DDP bf16, masters", setting.precision(), partial(ddp.ddp, plan=plan, dtype="bf16", masters=True)),
        Case("DDP autocast", "fp32 / fp32 / fp32 / -", partial(ddp.ddp, plan=plan, dtype="fp32", autocast=True)),
    ]


def _deepspeed(setting: Setting, stage: int) -> list[Case]:
    if not deepspeed.available():
        return []
    make = partial(deepspeed.deepspeed_zero, plan=setting.plan(WORLD), stage=stage, dtype=setting.dtype)
    return [Case(f"DeepSpeed ZeRO-{stage}", setting.precision(), make)]


def _fsdp2(setting: Setting, reshards: bool) -> Case:
    make = partial(fsdp2.fsdp2, plan=setting.plan(WORLD), dtype=setting.dtype, reshard_after_forward=reshards)
    return Case("FSDP2" if reshards else "FSDP2, no resharding", setting.precision(), make)


def races(setting: Setting) -> list[Race]:
    """One race for each stage."""
    found = []
    for zero in range(4):
        peers = _deepspeed(setting, zero) if zero else []
        if zero < 2:
            peers += _ddp(setting)
        else:
            peers.append(_fsdp2(setting, reshards=zero == 3))
        exact = tuple(case.name for case in peers if case.name != "DDP autocast")
        ours = _ours(setting, zero, exact)
        if zero < 2 and setting.dtype == "bf16":  # beside the peer whose gradients are of fp32
            ours += _ours(setting, zero, ("DDP autocast",), "fp32")
        tokens = tokens_of(setting.plan(WORLD))
        found.append(Race(f"zero-{zero}", f"zero = {zero}, two ranks", WORLD, tokens, [*peers, *ours]))
    return found
