"""A model of one's own under data and tensor parallelism: python examples/own_model.py"""

from torch import Tensor, nn
from torch.nn import functional as F

import shardwright.api as sw


class Block(nn.Module):
    """Attention and feed-forward. Tensors are [positions, sequences, hidden]; head counts follow from the weights."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        parts = tuple(sw.Part(name, hidden) for name in "qkv")
        self.norm = nn.LayerNorm(hidden)
        self.qkv = sw.Linear(hidden, 3 * hidden, bias=False, declaration=sw.Declaration(parts))
        self.out = nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0, 3) for t in qkv.chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2))
        return x + self.down(F.relu(self.up(x)).square())


class OwnModel(nn.Module):
    def __init__(self, vocab: int, hidden: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.output = sw.Output(hidden, vocab, std=0.02)

    def blocks(self) -> list[nn.Module]:
        return [self.embedding, *self.layers, self.output]

    def tensor_table(self) -> sw.Table:
        return {
            "embedding": sw.Vocabulary(),
            "layers.*.qkv": sw.Colwise(),
            "layers.*.out": sw.Rowwise(),
            "layers.*.up": sw.Colwise(),
            "layers.*.down": sw.Rowwise(),
            "output": sw.Vocabulary(output=True),
        }

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens.T)
        for layer in self.layers:
            x = layer(x)
        return self.output(x, targets.T)


def main(worker: sw.Worker, arguments: tuple[str, ...]) -> None:
    model = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 256}
    spec = sw.build({"model": model, "parallel": {"tp": 2}, "train": {"global_batch_size": 8}})
    data = sw.open_data(spec)
    plan = sw.plan_for(spec, worker.world_size, worker.device.type, data.vocab)
    runtime = sw.compose(plan, sw.Mesh(plan.topology, worker.device), OwnModel(data.vocab, 64, 4, 2))
    optimizer = sw.make_optimizer(spec.train, runtime.states.owned_tensors())
    for step in range(10):
        result = sw.train_step(runtime, optimizer, sw.rank_batch(runtime, data.train, step), lr=1e-3)
        if worker.rank == 0:
            print(f"step {step + 1}  loss {result.loss:.4f}", flush=True)


if __name__ == "__main__":
    raise SystemExit(sw.run(sw.Job(world_size=2, entry="own_model")))
