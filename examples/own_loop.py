"""A training loop of one's own: python examples/own_loop.py, or torchrun --nproc-per-node 2 examples/own_loop.py."""

from pathlib import Path

import shardwright.api as sw

RECIPE = {
    "model": {"layers": 2, "hidden": 64, "heads": 4, "ffn": 128},
    "data": {"corpus": "stdlib"},
    "train": {"steps": 20, "sequence_length": 64, "global_batch_size": 8, "micro_batch_size": 2},
    "parallel": {"zero": 2},
}


def main(worker: sw.Worker, arguments: tuple[str, ...]) -> None:
    spec = sw.build(RECIPE)
    data = sw.open_data(spec)
    plan = sw.plan_for(spec, worker.world_size, worker.device.type, data.vocab)
    mesh = worker.mesh(plan.topology)
    runtime = sw.compose(plan, mesh)
    optimizer = sw.make_optimizer(spec.train, runtime.states.owned_tensors())
    for step in range(spec.train.steps):
        batch = sw.rank_batch(runtime, data.train, step)
        result = sw.train_step(runtime, optimizer, batch, lr=sw.learning_rate(spec.train, step))
        if mesh.rank == 0:
            print(f"step {step + 1}  loss {result.loss:.4f}  gradient norm {result.grad_norm:.3f}", flush=True)
    assert data.validation is not None
    record = sw.evaluate(runtime, data.validation, spec.train.steps)
    saved = sw.save(Path("own-loop"), runtime, optimizer, step=spec.train.steps)
    if mesh.rank == 0:
        print(f"validation loss {record.loss:.4f}, saved in {saved}", flush=True)


if __name__ == "__main__":
    raise SystemExit(sw.run(sw.Job(world_size=2, entry="own_loop")))
