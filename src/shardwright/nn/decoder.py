"""A decoder-only transformer as one device would write it.

It knows nothing of other devices. `blocks()` lists its parts in the order of execution; what passes between them is a
tensor [positions, sequences, hidden], so any run of consecutive blocks can live somewhere else.
"""

from __future__ import annotations

from torch import Tensor, nn

from shardwright.nn.attention import Attention, Rotary
from shardwright.nn.mlp import make_mlp
from shardwright.nn.norm import make_norm
from shardwright.nn.vocabulary import Output, PositionEmbedding, TokenEmbedding
from shardwright.spec.architecture import Architecture


class Embedding(nn.Module):
    """Token ids to vectors, with learned positions added where the architecture has them."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.tokens = TokenEmbedding(a.vocab, a.hidden, std=a.init_std)
        learned = a.positions == "learned"
        self.positions = PositionEmbedding(a.max_positions, a.hidden, std=a.init_std) if learned else nn.Identity()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """int64 [B, T] to [T, B, hidden]."""
        return self.positions(self.tokens(tokens_BT.T))


class Layer(nn.Module):
    """Attention and feed-forward, each normalised before and added after."""

    draws_random = False

    def __init__(self, architecture: Architecture, rotary: Rotary | None) -> None:
        super().__init__()
        a = architecture
        self.attention_norm = make_norm(a.norm, a.hidden, a.norm_eps)
        self.attention = Attention(a, rotary)
        self.mlp_norm = make_norm(a.norm, a.hidden, a.norm_eps)
        self.mlp = make_mlp(a)

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, hidden] to [T, B, hidden]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Head(nn.Module):
    """The final norm, then the vocabulary product and the loss; `tied` is the embedding's weight, to be used again."""

    def __init__(self, architecture: Architecture, tied: nn.Parameter | None) -> None:
        super().__init__()
        a = architecture
        self.norm = make_norm(a.norm, a.hidden, a.norm_eps)
        self.output = Output(a.hidden, a.vocab, std=a.init_std, weight=tied)

    def forward(self, x_TBC: Tensor, targets_BT: Tensor | None) -> Tensor:
        """The sum of the loss over the targets that carry one; without targets the logits, [T, B, vocab]."""
        x_TBC = self.norm(x_TBC)
        return self.output.logits(x_TBC) if targets_BT is None else self.output(x_TBC, targets_BT.T)


class Decoder(nn.Module):
    """Embedding, layers, head. The loss is a sum over targets; whoever calls divides by their global number."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        rotary = Rotary(architecture) if architecture.positions == "rotary" else None
        self.embedding = Embedding(architecture)
        self.layers = nn.ModuleList(Layer(architecture, rotary) for _ in range(architecture.layers))
        self.head = Head(architecture, self.embedding.tokens.weight if architecture.tied_embeddings else None)

    def blocks(self) -> list[nn.Module]:
        """The parts in order of execution; the parameters of each are communicated together."""
        return [self.embedding, *self.layers, self.head]

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """The last layer's output, [T, B, hidden]."""
        x = self.embedding(tokens_BT)
        for layer in self.layers:
            x = layer(x)
        return x

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, vocab]; for inspection and inference, not for training."""
        return self.head(self.hidden(tokens_BT), None).transpose(0, 1)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The sum of the loss over the targets that carry one (IGNORED is -1), a scalar of at least fp32."""
        return self.head(self.hidden(tokens_BT), targets_BT)
