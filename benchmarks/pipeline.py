"""pp = 2 beside torch.distributed.pipelining: the 25 M-parameter model, 8 microbatches, all schedules, fp32 and bf16.

    python -m benchmarks.pipeline [--rounds 9] [--steps 1] [--dtype fp32 bf16] [--record]

A microbatch is one sequence of 512 tokens. Both sides clip by the global norm, summed over the stages in one small
reduction that carries the loss too, and update with fused AdamW. The peers run with the even split that is usually
written and with the balanced one, which counts the head. Peak memory is measured apart, each case in fresh processes.
bf16 is run where the CPU has units for it, or when asked for: without them it is many times slower than fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.ceiling import ceiling
from benchmarks.harness import Case, Result, Step, memory_table, peaks, race, table, write_record
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
    samples = RandomSamples(plan.architecture.vocab, LENGTH, 0)
    return lambda step: train_step(runtime, optimizer, rank_batch(runtime, samples, step), 1e-3).loss


def shown(split: Sequence[int]) -> str:
    """Layers of each stage: 5 + 3."""
    return " + ".join(str(layers) for layers in split)


def peers(dtype: str, layers: int, even: Split, balanced: Split) -> list[Case]:
    """torch's schedules, in one dtype throughout; in bf16 the balanced 1F1B under autocast too, which keeps fp32."""
    plan = plan_of("fp32", "fp32", layers)  # for sizes alone
    precision = f"{dtype} / {dtype} / - / {'-' if dtype == 'fp32' else 'none'}"
    found = []
    for title, schedule in (("1F1B", "1f1b"), ("GPipe", "gpipe")):
        for split in (even, balanced):
            make = partial(torch_pipeline, plan=plan, schedule=schedule, split=split, dtype=dtype)
            found.append(Case(f"torch {title}, {shown(split)}", precision, make))
    if dtype == "bf16":
        make = partial(torch_pipeline, plan=plan, schedule="1f1b", split=balanced, dtype="fp32", autocast=True)
        found.append(Case(f"torch 1F1B autocast, {shown(balanced)}", "fp32 / fp32 / - / -", make))
    return found


def ours(dtype: str, layers: int, even: Split, balanced: Split) -> list[Case]:
    """Every schedule of ours, each with the torch schedule that keeps as much; fp32 masters under bf16."""
    masters = "-" if dtype == "fp32" else "fp32"
    rows: list[tuple[str, str, int, Split, str]] = [
        ("1f1b", dtype, 1, (), f"torch 1F1B, {shown(balanced)}"),
        ("1f1b", dtype, 1, even, f"torch 1F1B, {shown(even)}"),
        ("gpipe", dtype, 1, (), f"torch GPipe, {shown(balanced)}"),
        ("zb-h1", dtype, 1, (), f"torch 1F1B, {shown(balanced)}"),
        ("interleaved", dtype, 2, (), f"torch 1F1B, {shown(balanced)}"),
        ("zbv", dtype, 2, (), f"torch 1F1B, {shown(balanced)}"),
    ]
    if dtype == "bf16":
        rows.append(("1f1b", "fp32", 1, (), f"torch 1F1B autocast, {shown(balanced)}"))
    found = []
    for schedule, grad_dtype, virtual_stages, stages, peer in rows:
        plan = plan_of(dtype, grad_dtype, layers, schedule, virtual_stages, stages)
        suffix = "" if grad_dtype == dtype else f", {grad_dtype} gradients"
        name = f"{schedule}, {shown(plan.layers_per_stage)}{suffix}"
        found.append(Case(name, f"{dtype} / {grad_dtype} / - / {masters}", partial(shardwright, plan=plan), peer))
    return found


def cases(dtype: str, layers: int) -> list[Case]:
    """The contenders of one precision, peers first, and the ceiling."""
    plan = plan_of(dtype, dtype, layers)
    even, balanced = (layers // 2, layers - layers // 2), plan.layers_per_stage
    found = [*peers(dtype, layers, even, balanced), *ours(dtype, layers, even, balanced)]
    masters = "-" if dtype == "fp32" else "fp32"
    top = Case(CEILING, f"{dtype} / {dtype} / - / {masters}", partial(ceiling, plan=plan), modelled=True)
    return [*{case.name: case for case in found}.values(), top]  # a balanced split that is even comes once


def check_losses(results: Sequence[Result]) -> str:
    """The first losses of both sides; ours are of one model and must agree, the peers' of another initialisation."""
    torchs = [r.first_loss for r in results if r.first_loss is not None and r.name.startswith("torch")]
    own = [r.first_loss for r in results if r.first_loss is not None and not r.name.startswith("torch")]
    assert max(own) - min(own) <= 1e-5 * min(own), f"one model, different losses: {own}"
    assert abs(max(torchs) - min(own)) <= 0.05 * min(own), f"losses far from each other: {own}, {torchs}"
    return f"first losses: ours {min(own):.6f} to {max(own):.6f}, torch's {min(torchs):.4f} to {max(torchs):.4f}"


def main() -> None:
    """Run the race, measure memory, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="steps a case takes in each round")
    native = ["fp32", "bf16"] if cpu_computes_bf16() else ["fp32"]
    parser.add_argument("--dtype", nargs="+", default=native, choices=["fp32", "bf16"])
    parser.add_argument("--layers", type=int, default=8, help="fewer, at least 4, to try the program")
    parser.add_argument("--record", action="store_true", help="keep the figures under benchmarks/records/")
    arguments = parser.parse_args()
    if arguments.record and arguments.layers != 8:
        parser.error("--record is for the whole model of 8 layers")
    tokens = SEQUENCES * MICROBATCHES * LENGTH
    for dtype in arguments.dtype:
        contenders = cases(dtype, arguments.layers)
        results = race(contenders, world=WORLD, rounds=arguments.rounds, steps=arguments.steps)
        columns = [*(case.name for case in contenders if case.name.startswith("torch 1F1B")), CEILING]
        print(f"{dtype}, {check_losses(results)}\n")
        print(table(results, tokens, columns), end="\n\n", flush=True)
        memory = peaks([case for case in contenders if not case.modelled], world=WORLD)
        print(memory_table(memory, {case.name: case.peer for case in contenders}), end="\n\n", flush=True)
        if arguments.record:
            command = f"python -m benchmarks.pipeline --dtype {dtype} --rounds {arguments.rounds}"
            print(write_record(f"pipeline_{dtype}", command, results, WORLD, tokens, columns, memory))


if __name__ == "__main__":
    main()
