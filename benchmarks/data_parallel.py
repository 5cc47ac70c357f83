"""ZeRO-0 and ZeRO-1 beside torch's DistributedDataParallel: the 25 M-parameter model on 2 ranks, fp32 and bf16.

    python -m benchmarks.data_parallel [--rounds 9] [--steps 2] [--dtype fp32 bf16] [--record]

Both train the same model code from the same initial values on the same tokens, clip by the global norm and update with
fused AdamW. DDP runs at its best setting: gradients as views of its buckets and a static graph.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Case, Step, race, table, write_record
from shardwright.comm.mesh import Mesh
from shardwright.data.batch import Batch
from shardwright.data.samples import RandomSamples
from shardwright.layout.mesh import Topology
from shardwright.nn.decoder import Decoder
from shardwright.nn.dtypes import torch_dtype
from shardwright.nn.initial import fill
from shardwright.nn.parameters import pieces_of
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build
from shardwright.train.step import train_step

SEQUENCES, LENGTH, WORLD = 2, 512, 2


def plan_of(world: int, dtype: str, grad_dtype: str, zero: int) -> Plan:
    """The 25 M-parameter model, 2 sequences of 512 tokens a rank, one microbatch."""
    train = {
        "sequence_length": LENGTH,
        "global_batch_size": SEQUENCES * world,
        "micro_batch_size": SEQUENCES,
        "dtype": dtype,
        "grad_dtype": grad_dtype,
    }
    tables = {"model": {"preset": "small-25m"}, "train": train, "parallel": {"zero": zero}}
    return resolve(build(tables), world_size=world, device="cpu", native_bf16=True, tokenizer_vocab=None)


def _batch(plan: Plan, step: int, rank: int) -> Batch:
    first = (step * WORLD + rank) * SEQUENCES
    return RandomSamples(plan.architecture.vocab, LENGTH, 0).at(range(first, first + SEQUENCES))


def shardwright(rank: int, world: int, *, dtype: str, grad_dtype: str, zero: int, alone: bool = False) -> Step:
    """Shardwright's own training step; `alone` leaves the other ranks out: the ceiling that no communication allows."""
    plan = plan_of(1 if alone else world, dtype, grad_dtype, zero)
    ranks = [rank] if alone else range(world)
    topology = Topology() if alone else plan.topology
    runtime = compose(plan, Mesh(topology, torch.device("cpu"), ranks=ranks, rank=rank))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    return lambda step: train_step(runtime, optimizer, _batch(plan, step, rank), 1e-3).loss


def _whole_model(plan: Plan, dtype: torch.dtype) -> nn.Module:
    model = Decoder(plan.architecture).to(dtype)
    with torch.no_grad():
        for parameter, pieces in pieces_of(model).items():
            for piece in pieces:
                fill(parameter.view(-1)[piece.start : piece.stop], piece.box, plan.spec.train.seed)
    return model


def ddp(rank: int, world: int, *, dtype: str, autocast: bool = False) -> Step:
    """torch's DistributedDataParallel in one dtype throughout, or in fp32 with matrix products autocast to bf16."""
    plan = plan_of(world, "fp32", "fp32", 0)
    model = _whole_model(plan, torch_dtype(dtype))
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step(index: int) -> float:
        batch = _batch(plan, index, rank)
        tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
        count = torch.tensor(float(batch.num_targets()), dtype=torch.float64)
        dist.all_reduce(count)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = parallel(tokens, targets) * (world / count)  # DDP averages over ranks
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = loss.detach() / world
        dist.all_reduce(total)
        return float(total)

    return step


def cases(dtype: str) -> list[Case]:
    """The contenders of one precision, each of ours with the peer that keeps the same things."""
    if dtype == "fp32":
        precision = "fp32 / fp32 / fp32 / -"
        found = [Case("DDP fp32", precision, partial(ddp, dtype="fp32"))]
        for zero in (0, 1):
            make = partial(shardwright, dtype="fp32", grad_dtype="fp32", zero=zero)
            found.append(Case(f"zero-{zero} fp32", precision, make, "DDP fp32"))
        make = partial(shardwright, dtype="fp32", grad_dtype="fp32", zero=0, alone=True)
        return [*found, Case("no communication, fp32", precision, make, "DDP fp32")]
    found = [
        Case("DDP bf16", "bf16 / bf16 / bf16 / none", partial(ddp, dtype="bf16")),
        Case("DDP autocast", "fp32 / fp32 / fp32 / -", partial(ddp, dtype="fp32", autocast=True)),
    ]
    for grad_dtype, peer in (("bf16", "DDP bf16"), ("fp32", "DDP autocast")):
        precision = f"bf16 / {grad_dtype} / {grad_dtype} / fp32"
        for zero in (0, 1):
            make = partial(shardwright, dtype="bf16", grad_dtype=grad_dtype, zero=zero)
            found.append(Case(f"zero-{zero} bf16, {grad_dtype} gradients", precision, make, peer))
    make = partial(shardwright, dtype="bf16", grad_dtype="bf16", zero=0, alone=True)
    return [*found, Case("no communication, bf16", "bf16 / bf16 / - / fp32", make, "DDP bf16")]


def main() -> None:
    """Run the race and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="steps a case takes in each round")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--record", action="store_true", help="keep the figures under benchmarks/records/")
    arguments = parser.parse_args()
    tokens = WORLD * SEQUENCES * LENGTH
    for dtype in arguments.dtype:
        results = race(cases(dtype), world=WORLD, rounds=arguments.rounds, steps=arguments.steps)
        losses = [result.first_loss for result in results]
        print(f"{dtype}, first losses {min(losses):.4f} to {max(losses):.4f}\n")
        print(table(results, tokens), end="\n\n", flush=True)
        if arguments.record:
            command = f"python -m benchmarks.data_parallel --dtype {dtype} --rounds {arguments.rounds}"
            print(write_record(f"data_parallel_{dtype}", command, results, WORLD, tokens))


if __name__ == "__main__":
    main()
