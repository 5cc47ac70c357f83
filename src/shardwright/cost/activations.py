"""What a model's blocks allocate, keep and free, forward and backward, as tapes.

Note: how the tapes were found. They follow the operations of nn/ and parallel/ one by one: what an operation makes is
taken, what nothing refers to any more is dropped. `benchmarks/memory.py` compares them with the live tensors of real
steps, rank by rank. A backward takes back exactly what its forward kept, and a test says so; what remains is the
gradient of the block's input.
"""

from __future__ import annotations

from shardwright.cost.shapes import Shapes, chunk_tokens, keeps_logit_gradients, summed
from shardwright.cost.tape import Tape


class Norm:
    """A norm over `elements` elements of rows of `size`."""

    def __init__(self, s: Shapes, elements: int, size: int, kind: str) -> None:
        self._s, self._elements, self._is_rms = s, elements, kind == "rmsnorm"
        self.stats = elements // size * s.wide * (1 if self._is_rms else 2)
        self.output = elements * s.element
        self._wide = elements * s.wide if s.element < 4 else 0

    def forward(self, t: Tape) -> None:
        """Makes its statistics and its output."""
        t.take(self.stats)
        # On CPUs, in bf16, the normalised input exists in fp32 for a moment.
        wide = self._wide if self._is_rms and self._s.device == "cpu" else 0
        t.take(wide)
        t.take(self.output)
        t.drop(wide)

    def backward(self, t: Tape) -> None:
        """Makes the gradient of its input; the gradient of its output and what it kept are the caller's to drop."""
        if not self._is_rms or self._s.device != "cpu":
            t.take(self.output)
            return
        size = self._elements * self._s.wide
        t.take(2 * size)  # the normalised input, and its product with the gradient
        t.drop(size)
        t.take(size)
        if self._wide:
            t.take(self.output)
            t.drop(size)
        t.drop(size)


class LayerTape:
    """One layer under a setting of recomputation: none, selective or full.

    `forward` begins with the layer's input and ends with its output beside what is kept; `backward` begins with the
    gradient of the output and ends with that of the input, and drops the input. A tape may hold anything else.
    """

    def __init__(self, s: Shapes, setting: str) -> None:
        self.s, self.setting = s, setting
        a, d, (q, kv) = s.a, s.a.head_dim, s.heads
        self.norm = Norm(s, s.between, a.hidden, a.norm)
        self.head_norms = [Norm(s, s.tokens * n * d, d, "rmsnorm") for n in ((q, kv) if a.qk_norm else ())]
        self.normed = s.whole if s.shards_positions else s.hidden
        """Bytes of a product's input, gathered."""
        self.rotated = s.queries + s.keys if a.qk_norm else 0
        """Bytes of queries and keys that have memory of their own beside the fused product."""

    @property
    def kept_by_attention(self) -> int:
        """Bytes that the first half leaves for the backward."""
        if self.setting == "full":
            return 0
        s = self.s
        kept = self.norm.stats + sum(n.stats for n in self.head_norms) + s.qkv + s.queries + s.log_sums
        return kept + (self.normed + self.rotated if self.setting == "none" else 0)

    @property
    def kept_by_feed_forward(self) -> int:
        """Bytes that the second half leaves for the backward."""
        if self.setting == "full":
            return 0
        kept = self.norm.stats + self.s.up
        return kept + (self.normed + self.s.inner if self.setting == "none" else 0)

    @property
    def kept(self) -> int:
        """Bytes that the forward leaves for the backward, the layer's input and output apart."""
        middle = 0 if self.setting == "full" else self.s.hidden
        return self.kept_by_attention + middle + self.kept_by_feed_forward

    # Forward

    def forward(self, t: Tape) -> None:
        """All of it, from the input to the output."""
        begin = t.activations
        self._into_attention(t)
        self._add(t, begin + self.kept_by_attention)
        middle = t.activations
        self._into_feed_forward(t)
        self._add(t, begin if self.setting == "full" else middle + self.kept_by_feed_forward)

    def _into_attention(self, t: Tape) -> None:
        s = self.s
        self._normed_input(t)
        t.take(s.qkv)
        for norm in self.head_norms:
            norm.forward(t)
        if s.a.positions == "rotary":
            t.brief((s.queries + s.keys) // 2)
        t.take(s.queries + s.log_sums)

    def _into_feed_forward(self, t: Tape) -> None:
        self._normed_input(t)
        t.take(self.s.up)
        t.take(self.s.inner)
        if self.setting == "full":
            t.drop(self.s.up)

    def _normed_input(self, t: Tape) -> None:
        """What a product takes. The rank's own positions stay until the function that has them as argument returns."""
        self.norm.forward(t)
        t.take(self.s.whole if self.s.shards_positions else 0)

    def _add(self, t: Tape, rest: float) -> None:
        """The output product, summed over ranks, and the sum with what went around. When the function that made it
        returns, of everything else only `rest` is left."""
        s = self.s
        self._sum(t)
        product = s.whole
        if s.a.bias:
            t.take(s.hidden)
            t.drop(s.whole)
            product = s.hidden
        t.drop(t.activations - rest - product)
        t.take(s.hidden)
        t.drop(product)

    def _sum(self, t: Tape) -> None:
        """Partial sums of all positions, and the buffers in which others' arrive."""
        t.take(self.s.whole)
        received = summed(self.s)
        t.open(received)
        t.close(received)

    # Backward

    def backward(self, t: Tape, *, keeps_input: bool = False, defers: bool = False) -> None:
        """All of it. `keeps_input`: somebody else has the input too, as the executor has that of a stage. `defers`: the
        factors of weight gradients stay, for `weights`."""
        if self.setting == "full":
            LayerTape(self.s, "none").recompute(t)
        self._feed_forward_backward(t, defers)
        self._attention_backward(t, 0 if keeps_input else self.s.hidden, defers)

    @property
    def _factors(self) -> list[tuple[int, int]]:
        """Of each product, backwards: bytes of the two factors of its weight's gradient, and elements of the weight."""
        s, a, d, (q, kv) = self.s, self.s.a, self.s.a.head_dim, self.s.heads
        gradient = s.whole if s.shards_positions else s.hidden
        ffn = s.part(a.ffn)
        return [
            (gradient + s.inner, a.hidden * ffn),
            (s.up + self.normed, a.hidden * ffn * s.up // s.inner),
            (gradient + s.queries, a.hidden * q * d),
            (s.qkv + self.normed, a.hidden * (q + 2 * kv) * d),
        ]

    def weights(self, t: Tape) -> None:
        """What a backward that defers has left."""
        for factors, elements in self._factors:
            t.brief(self.s.converted(elements))
            t.drop(factors)

    def recompute(self, t: Tape) -> None:
        """The forward up to the last tensor that the backward needs."""
        begin = t.activations
        self._into_attention(t)
        self._add(t, begin + self.kept_by_attention)
        middle = t.activations
        self._into_feed_forward(t)
        t.drop(t.activations - middle - self.kept_by_feed_forward)

    def _feed_forward_backward(self, t: Tape, defers: bool) -> None:
        s, ffn = self.s, self.s.part(self.s.a.ffn)
        t.take(s.inner if self.setting == "selective" else 0)
        self._rowwise_backward(t, s.inner, s.a.hidden * ffn, defers)
        t.drop(0 if defers else s.inner)
        t.take(s.up)
        t.brief(s.inner if s.a.activation == "swiglu" else 0)
        t.drop(s.inner + s.up)
        self._colwise_backward(t, s.up, s.hidden, s.converted(s.a.hidden * ffn * s.up // s.inner), defers)

    def _attention_backward(self, t: Tape, input_size: int, defers: bool) -> None:
        s, d, (q, kv) = self.s, self.s.a.head_dim, self.s.heads
        self._rowwise_backward(t, s.queries, s.a.hidden * q * d, defers)
        t.take(self.rotated if self.setting == "selective" else 0)
        t.take(s.qkv)
        t.drop(s.queries + (0 if defers else s.queries) + s.log_sums + (self.rotated or s.qkv))
        for norm, size in zip(self.head_norms, (s.queries, s.keys), strict=False):
            norm.backward(t)
            t.drop(size + norm.stats)
        t.drop(s.qkv if self.head_norms else 0)
        t.brief(s.qkv)  # the three gradients, put together
        if s.a.positions == "rotary" and not self.head_norms:
            t.brief((s.queries + s.keys) // 2)
        weight = s.a.hidden * (q + 2 * kv) * d
        shared = s.a.kv_heads % s.tp != 0  # then autograd makes it, and the sum over holders a copy
        self._colwise_backward(t, s.qkv, input_size, 2 * weight * s.element if shared else s.converted(weight), defers)

    def _rowwise_backward(self, t: Tape, result: int, elements: int, defers: bool) -> None:
        """The gradient of a product's input."""
        s = self.s
        gathered = s.whole if s.shards_positions else 0
        t.take(gathered)
        t.take(result)
        t.brief(0 if defers else s.converted(elements))
        t.drop(0 if defers else gathered)

    def _colwise_backward(self, t: Tape, output: int, input_size: int, weight: int, defers: bool) -> None:
        """From the gradient of a product's output, past the norm and the sum with the gradient that went around."""
        s, again = self.s, 0
        if self.setting == "selective":
            self._normed_input(t)
            t.drop(self.norm.stats)
            again = s.hidden if s.shards_positions else 0
        self._sum(t)
        t.brief(0 if defers else weight)
        t.drop(again if defers else output + self.normed + again)
        self.norm.backward(t)
        t.drop(s.whole + self.norm.stats + input_size)
        t.take(s.hidden)
        t.drop(s.hidden if defers and not s.shards_positions else 2 * s.hidden)


class EmbeddingTape:
    """Token ids to hidden states; what is kept are indices. `tied`: the head of this rank has the same weight, and
    autograd sums what both bring."""

    def __init__(self, s: Shapes, *, tied: bool) -> None:
        self.s = s
        # Without learned positions the layers' first input is a view of the sum over ranks, and keeps all of it.
        self._view = 0 if s.a.positions == "learned" else s.whole - s.hidden
        self._by_rows = s.device == "cpu" and not tied

    def forward(self, t: Tape) -> None:
        """The rows of this rank's words, and their sum over ranks."""
        s = self.s
        t.take(s.whole)
        received = summed(s)
        t.open(received)
        t.close(received)
        if s.a.positions == "learned":
            t.take(s.hidden)
            t.drop(s.whole)

    def backward(self, t: Tape) -> None:
        """The gradients of all words, in the dtype of compute, or of those that occurred; the output's gradient is gone
        at the end."""
        s, hidden = self.s, self.s.a.hidden
        t.drop(self._view)
        gathered = s.whole if s.shards_positions else 0
        t.take(gathered)
        if self._by_rows:
            # All tokens may have this rank's words; those that occurred are at most as many as there are.
            t.take(s.whole if s.tp > 1 else 0)
            t.brief(s.tokens * hidden * s.wide if s.wide != s.element else 0)
            t.brief((s.tokens + min(s.tokens, s.words)) * hidden * s.wide if s.grad_dtype == "bf16" else 0)
            t.drop(s.whole if s.tp > 1 else 0)
        else:
            t.take(s.whole if s.tp > 1 else 0)
            t.brief(s.words * hidden * s.element)
            t.drop(s.whole if s.tp > 1 else 0)
        t.drop(s.hidden + gathered)


class HeadTape:
    """The final norm, the vocabulary product and the loss: its gradients are made in the forward."""

    def __init__(self, s: Shapes) -> None:
        self.s = s
        self.norm = Norm(s, s.between, s.a.hidden, s.a.norm)
        self.weight = s.words * s.a.hidden * s.element
        self._kept = self.norm.stats + s.whole + self.weight

    def forward(self, t: Tape) -> None:
        """Of the logits a chunk at a time."""
        s = self.s
        begin = t.activations
        self.norm.forward(t)
        t.take(s.whole if s.shards_positions else 0)
        t.take(s.whole)  # the gradient of the hidden states
        step = chunk_tokens(s.most_words, s.device)
        remaining, weight, wide_weight = s.tokens, 0, self.weight // s.element * s.wide
        kept = s.tokens * s.words * s.element
        kept *= keeps_logit_gradients(s.tokens, step, s.a.hidden, s.element, s.wide)
        while remaining > 0:
            tokens = min(step, remaining)
            remaining -= tokens
            narrow, wide = tokens * s.words * s.element, tokens * s.words * s.wide
            t.take(narrow)
            if s.wide != s.element:
                t.take(wide)
                t.drop(narrow)
                t.take(narrow if not kept else kept if remaining + tokens == s.tokens else 0)
                t.drop(wide)
            if kept:
                continue
            # In bf16 a second chunk's product is added in fp32.
            if s.wide != s.element and weight:
                t.take(wide_weight if weight == self.weight else 0)
                t.drop(self.weight if weight == self.weight else 0)
                t.brief(self.weight)
                weight = wide_weight
            elif not weight:
                t.take(self.weight)
                weight = self.weight
            t.drop(narrow)
        received = summed(s)
        t.open(received)
        if kept or weight != self.weight:
            t.take(self.weight)
            t.drop(kept or weight)
        t.close(received)
        t.drop(t.activations - begin - self._kept)

    def backward(self, t: Tape, *, keeps_input: bool = False) -> None:
        """From the loss to the gradient of the last layer's output, whose values are dropped."""
        s = self.s
        t.take(s.hidden)
        t.brief(self.weight if s.dtype != s.grad_dtype else 0)
        t.drop(s.whole + self.weight)
        self.norm.backward(t)
        t.drop(s.hidden + self.norm.stats)
        t.drop(0 if keeps_input else s.hidden)
