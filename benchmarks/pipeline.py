"""pp = 2 beside torch.distributed.pipelining: the 25 M-parameter model, 8 microbatches, all schedules, fp32 and bf16.

    python -m benchmarks.pipeline [--rounds 9] [--steps 1] [--dtype fp32 bf16] [--record]

A microbatch is one sequence of 512 tokens. Both sides clip by the global norm, summed over the stages in one small
reduction that carries the loss too, and update with fused AdamW. The peers run with the even split that is usually
written and with the balanced one, which counts the head; each of our schedules stands beside torch's own. Peak memory
is measured apart, each case in fresh processes. bf16 is run where the CPU has units for it, or when asked for: without
them it is many times slower than fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.ceiling import ceiling
from benchmarks.harness import Case, Peak, Result, Step, memory_table, peaks, race, table, write_record
from benchmarks.peers.pipelining import torch_pipeline
from shardwright.comm.mesh import Mesh
from shardwright.data.samples import RandomSamples
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.plan.machine import cpu_computes_bf16
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build
from shardwright.train.batches import rank_batch
from shardwright.train.step import train_step

SEQUENCES, LENGTH, MICROBATCHES, WORLD = 1, 512, 8, 2
CEILING = "ceiling of 1f1b"
Split = tuple[int, ...]


def plan_of(
    dtype: str, grad_dtype: str, layers: int, schedule: str = "1f1b", virtual_stages: int = 1, stages: Split = ()
) -> Plan:
    """The 25 M-parameter model (at 8 layers) on 2 stages, or on 4 where ranks have two; balanced unless told."""
    train = {
        "sequence_length": LENGTH,
        "global_batch_size": SEQUENCES * MICROBATCHES,
        "micro_batch_size": SEQUENCES,
        "dtype": dtype,
        "grad_dtype": grad_dtype,
    }
    parallel = {
        "dp": 1,
        "pp": WORLD,
        "zero": 0,
        "pipeline_schedule": schedule,
        "virtual_stages": virtual_stages,
        "stages": list(stages) if stages else "auto",
    }
    tables = {"model": {"preset": "small-25m", "layers": layers}, "train": train, "parallel": parallel}
    return resolve(build(tables), world_size=WORLD, device="cpu", native_bf16=True, tokenizer_vocab=None)


def shardwright(rank: int, world: int, *, plan: Plan) -> Step:
    """Shardwright's own training step."""
    runtime = compose(plan, Mesh(plan.topology, torch.device("cpu")))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 0)
    return lambda step: train_step(runtime, optimizer, rank_batch(runtime, samples, step), 1e-3).loss


def shown(split: Sequence[int]) -> str:
    """Layers of each stage: 5 + 3."""
    return " + ".join(str(layers) for layers in split)


def peers(dtype: str, layers: int, even: Split, balanced: Split) -> list[Case]:
    """torch's schedules, in one dtype throughout; in bf16 the balanced 1F1B under autocast too, which keeps fp32."""
    plan = plan_of("fp32", "fp32", layers)  # for sizes alone
    precision = f"{dtype} / {dtype} / - / {'-' if dtype == 'fp32' else 'none'}"
    rows = [("1f1b", even), ("1f1b", balanced), ("gpipe", even), ("gpipe", balanced), ("zb-h1", balanced)]
    rows += [(name, plan_of("fp32", "fp32", layers, name, 2).layers_per_stage) for name in ("interleaved", "zbv")]
    found = []
    for schedule, split in rows:
        make = partial(torch_pipeline, plan=plan, schedule=schedule, split=split, dtype=dtype)
        found.append(Case(f"torch {schedule}, {shown(split)}", precision, make))
    if dtype == "bf16":
        make = partial(torch_pipeline, plan=plan, schedule="1f1b", split=balanced, dtype="fp32", autocast=True)
        found.append(Case(f"torch 1f1b autocast, {shown(balanced)}", "fp32 / fp32 / - / -", make))
    return found


def ours(dtype: str, plans: Sequence[Plan]) -> list[Case]:
    """Shardwright's case of each plan, beside torch's case of the same schedule and split; fp32 masters under bf16."""
    found = []
    for plan in plans:
        schedule, split = plan.spec.parallel.pipeline_schedule, shown(plan.layers_per_stage)
        suffix, kind = ("", "") if plan.grad_dtype == dtype else (f", {plan.grad_dtype} gradients", " autocast")
        precision = f"{dtype} / {plan.grad_dtype} / - / {'-' if dtype == 'fp32' else 'fp32'}"
        make = partial(shardwright, plan=plan)
        found.append(Case(f"{schedule}, {split}{suffix}", precision, make, f"torch {schedule}{kind}, {split}"))
    return found


def cases(dtype: str, layers: int) -> list[Case]:
    """The contenders of one precision, peers first, and the ceiling."""
    plan, even = plan_of(dtype, dtype, layers), (layers // 2, layers - layers // 2)
    plans = [
        plan,
        plan_of(dtype, dtype, layers, stages=even),
        plan_of(dtype, dtype, layers, "gpipe"),
        plan_of(dtype, dtype, layers, "zb-h1"),
        plan_of(dtype, dtype, layers, "interleaved", 2),
        plan_of(dtype, dtype, layers, "zbv", 2),
    ]
    if dtype == "bf16":
        plans.append(plan_of(dtype, "fp32", layers))
    found = [*peers(dtype, layers, even, plan.layers_per_stage), *ours(dtype, plans)]
    precision = f"{dtype} / {dtype} / - / {'-' if dtype == 'fp32' else 'fp32'}"
    top = Case(CEILING, precision, partial(ceiling, plan=plan), modelled=True)
    return [*{case.name: case for case in found}.values(), top]  # a balanced split that is even comes once


def check_losses(results: Sequence[Result]) -> str:
    """The first losses of both sides; ours are of one model and must agree, the peers' of another initialisation."""
    torchs = [r.first_loss for r in results if r.first_loss is not None and r.name.startswith("torch")]
    own = [r.first_loss for r in results if r.first_loss is not None and not r.name.startswith("torch")]
    assert max(own) - min(own) <= 1e-5 * min(own), f"one model, different losses: {own}"
    assert max(abs(loss - min(own)) for loss in torchs) <= 0.05 * min(own), f"far from each other: {own}, {torchs}"
    return f"first losses: ours {min(own):.6f} to {max(own):.6f}, torch's {min(torchs):.4f} to {max(torchs):.4f}"


def main() -> None:
    """Run the race, measure memory, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="steps a case takes in each round")
    native = ["fp32", "bf16"] if cpu_computes_bf16() else ["fp32"]
    parser.add_argument("--dtype", nargs="+", default=native, choices=["fp32", "bf16"])
    parser.add_argument("--layers", type=int, default=8, help="fewer, at least 4, to try the program")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="cases whose names hold one of these")
    parser.add_argument("--record", action="store_true", help="keep the figures under benchmarks/records/")
    arguments = parser.parse_args()
    if arguments.record and arguments.layers != 8:
        parser.error("--record is for the whole model of 8 layers")
    tokens = SEQUENCES * MICROBATCHES * LENGTH
    for dtype in arguments.dtype:
        contenders = [
            case
            for case in cases(dtype, arguments.layers)
            if not arguments.only or any(part in case.name for part in arguments.only)
        ]
        results = race(contenders, world=WORLD, rounds=arguments.rounds, steps=arguments.steps)
        columns = [case.name for case in contenders if case.modelled or case is contenders[0]]
        print(f"{dtype}, {check_losses(results)}\n")
        print(table(results, tokens, columns), end="\n\n", flush=True)
        chosen = "".join(f' "{part}"' for part in arguments.only)
        options = f"--dtype {dtype} --rounds {arguments.rounds}" + (f" --only{chosen}" if chosen else "")
        keep = partial(_keep, dtype, options, results, columns) if arguments.record else None
        if keep:
            keep(())  # the race is kept even if what follows is interrupted
        memory = peaks([case for case in contenders if not case.modelled], world=WORLD)
        print(memory_table(memory, {case.name: case.peer for case in contenders}), end="\n\n", flush=True)
        if keep:
            print(keep(memory))


def _keep(dtype: str, options: str, results: Sequence[Result], columns: Sequence[str], memory: Sequence[Peak]) -> Path:
    command = f"python -m benchmarks.pipeline {options}"
    tokens = SEQUENCES * MICROBATCHES * LENGTH
    return write_record(f"pipeline_{dtype}", command, results, WORLD, tokens, columns, memory)


if __name__ == "__main__":
    main()
