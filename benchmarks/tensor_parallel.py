"""tp = 2 beside torch's own tensor parallelism with sequence parallelism: the 25 M-parameter model, fp32 and bf16.

    python -m benchmarks.tensor_parallel [--rounds 9] [--steps 2] [--dtype fp32 bf16] [--record]

The peer is `parallelize_module` as torch's tutorial uses it: colwise and rowwise products, sequence-parallel norms, the
embedding and the output divided by words, and the loss computed on divided logits (`loss_parallel`).
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

from benchmarks.harness import Case, Step, race, table, write_record
from benchmarks.peers.llama import Llama
from shardwright.comm.mesh import Mesh
from shardwright.data.samples import RandomSamples
from shardwright.nn.dtypes import torch_dtype
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build
from shardwright.train.step import train_step

SEQUENCES, LENGTH, WORLD = 2, 512, 2


def plan_of(dtype: str, grad_dtype: str, tp: int, sequence_parallel: bool = True) -> Plan:
    """The 25 M-parameter model, 2 sequences of 512 tokens, one microbatch."""
    tables = {
        "model": {"preset": "small-25m"},
        "train": {
            "sequence_length": LENGTH,
            "global_batch_size": SEQUENCES,
            "micro_batch_size": SEQUENCES,
            "dtype": dtype,
            "grad_dtype": grad_dtype,
        },
        "parallel": {"dp": 1, "tp": tp, "zero": 0, "sequence_parallel": sequence_parallel},
    }
    return resolve(build(tables), world_size=tp, device="cpu", native_bf16=True, tokenizer_vocab=None)


def shardwright(rank: int, world: int, *, dtype: str, grad_dtype: str, sequence_parallel: bool) -> Step:
    """Shardwright's own training step."""
    plan = plan_of(dtype, grad_dtype, world, sequence_parallel)
    runtime = compose(plan, Mesh(plan.topology, torch.device("cpu")))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, LENGTH, 0)

    def step(index: int) -> float:
        batch = samples.at(range(index * SEQUENCES, (index + 1) * SEQUENCES))
        return train_step(runtime, optimizer, batch, 1e-3).loss

    return step


def _parallelize(model: nn.Module, world: int) -> None:
    """The plan of torch's tutorial on tensor parallelism with sequence parallelism and parallel loss."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    ends = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, ends)
    whole = {"desired_input_layouts": (Replicate(),)}
    inner = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), **whole),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        "feed_forward.w3": ColwiseParallel(),
    }
    for layer in model.get_submodule("layers").children():
        parallelize_module(layer, mesh, inner)


def torch_tensor_parallel(rank: int, world: int, *, dtype: str) -> Step:
    """torch's tensor parallelism, in one dtype throughout."""
    torch.manual_seed(0)
    plan = plan_of("fp32", "fp32", 1)
    model = Llama(plan.architecture, LENGTH).to(torch_dtype(dtype))
    _parallelize(model, world)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    samples = RandomSamples(plan.architecture.vocab, LENGTH, 0)

    def step(index: int) -> float:
        batch = samples.at(range(index * SEQUENCES, (index + 1) * SEQUENCES))
        tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
        with loss_parallel():
            logits = model(tokens)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="mean")
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = loss.detach()
        return float(total.full_tensor() if hasattr(total, "full_tensor") else total)

    return step


def cases(dtype: str) -> list[Case]:
    """The contenders of one precision; ours has fp32 masters under bf16, the peer none."""
    masters = "-" if dtype == "fp32" else "fp32"
    peer = f"torch TP {dtype}"
    found = [
        Case(
            peer,
            f"{dtype} / {dtype} / {dtype} / {'-' if dtype == 'fp32' else 'none'}",
            partial(torch_tensor_parallel, dtype=dtype),
        )
    ]
    for name, sequence_parallel in (("sequence parallel", True), ("all-reduce form", False)):
        make = partial(shardwright, dtype=dtype, grad_dtype=dtype, sequence_parallel=sequence_parallel)
        found.append(Case(f"tp=2 {dtype}, {name}", f"{dtype} / {dtype} / {dtype} / {masters}", make, peer))
    return found


def main() -> None:
    """Run the race and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="steps a case takes in each round")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--record", action="store_true", help="keep the figures under benchmarks/records/")
    arguments = parser.parse_args()
    tokens = SEQUENCES * LENGTH
    for dtype in arguments.dtype:
        results = race(cases(dtype), world=WORLD, rounds=arguments.rounds, steps=arguments.steps)
        losses = [result.first_loss for result in results]
        print(f"{dtype}, first losses {min(losses):.4f} to {max(losses):.4f}\n")
        print(table(results, tokens), end="\n\n", flush=True)
        if arguments.record:
            command = f"python -m benchmarks.tensor_parallel --dtype {dtype} --rounds {arguments.rounds}"
            print(write_record(f"tensor_parallel_{dtype}", command, results, WORLD, tokens))


if __name__ == "__main__":
    main()
