"""How tokens are drawn and where texts end."""

from __future__ import annotations

import pytest
import torch

from shardwright.cost.cache import cache_bytes
from shardwright.data.tokenizer import BytesTokenizer
from shardwright.infer.sampling import choose
from shardwright.infer.settings import Finish, Settings
from shardwright.infer.text import Ends, Generated, text_of
from shardwright.nn.cache import LayerCache, Places
from shardwright.spec.architecture import resolve_architecture
from shardwright.spec.model import ModelSpec

DRAWS = 20_000


def frequencies(logits: list[float], settings: Settings) -> torch.Tensor:
    """How often each token is drawn, over many prompts."""
    rows = torch.tensor([logits]).expand(DRAWS, -1)
    drawn = choose(rows, [(number, 0) for number in range(DRAWS)], settings)
    return torch.bincount(drawn, minlength=len(logits)).double() / DRAWS


def test_tokens_are_drawn_from_the_softmax() -> None:
    logits = [2.0, 1.0, 0.0, -1.0, 1.5]
    for temperature in (0.7, 1.0, 2.0):
        expected = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0)
        found = frequencies(logits, Settings(temperature=temperature))
        # Four standard deviations of a binomial share.
        assert ((found - expected).abs() < 4 * (expected * (1 - expected) / DRAWS).sqrt()).all()


def test_what_is_left_out_is_never_drawn_and_the_rest_keeps_its_shares() -> None:
    logits = [2.0, 1.0, 0.0, -1.0, 1.5]
    probabilities = torch.tensor(logits, dtype=torch.float64).softmax(0)
    for settings, kept in (
        (Settings(temperature=1.0, top_k=2), [0, 4]),
        (Settings(temperature=1.0, top_p=0.5), [0, 4]),  # the first has 0.46, so that the next is needed
        (Settings(temperature=1.0, top_p=0.4), [0]),
        (Settings(temperature=1.0, top_k=3, top_p=0.99), [0, 1, 4]),
    ):
        found = frequencies(logits, settings)
        expected = torch.zeros(5, dtype=torch.float64)
        expected[kept] = probabilities[kept] / probabilities[kept].sum()
        assert set(found.nonzero().flatten().tolist()) == set(kept)
        assert torch.allclose(found, expected, atol=0.015)


def test_a_draw_depends_on_its_seed_prompt_and_place_alone() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    settings = Settings(temperature=1.5, seed=3)
    places = [(5, 0), (9, 2), (0, 7), (1, 1)]
    together = choose(logits, places, settings)
    alone = torch.cat([choose(logits[i : i + 1], [places[i]], settings) for i in range(4)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, choose(logits, places, Settings(temperature=1.5, seed=4)))


def ends(stop: tuple[str, ...] = (), most: int = 99, context: int = 100) -> Ends:
    return Ends({256}, BytesTokenizer(), Settings(max_new_tokens=most, stop=stop), context)


def test_where_a_sequence_ends() -> None:
    sequence = Generated(0, (1, 2, 3), list(b"abc"))
    assert ends().after(sequence, 256) is Finish.STOP
    assert ends(("cd",)).after(sequence, ord("d")) is Finish.STOP
    assert ends(("cx",)).after(sequence, ord("d")) is None
    assert ends(most=4).after(sequence, ord("d")) is Finish.LENGTH
    assert ends(context=7).after(sequence, ord("d")) is Finish.LENGTH
    assert ends(context=8).after(sequence, ord("d")) is None


def test_text_that_goes_on_holds_back_what_may_still_change() -> None:
    assert text_of(list(b"wait STO"), ends(("STOP",)), complete=False) == "wait "
    assert text_of(list(b"wait STO"), ends(("STOP",)), complete=True) == "wait STO"
    assert text_of(list(b"wait STOP"), ends(("STOP",)), complete=True) == "wait "
    whole = "naïve".encode()
    assert text_of(list(whole[:3]), ends(), complete=False) == "na"
    assert text_of([*whole, 256], ends(), complete=True) == "naïve"


def test_texts_as_they_come_only_grow() -> None:
    tokens = list("héllo STO wörld ST OP".encode())
    shown = ""
    for count in range(1, len(tokens) + 1):
        text = text_of(tokens[:count], ends(("STOP", "OPEN")), complete=count == len(tokens))
        assert text.startswith(shown)
        shown = text
    assert shown == "héllo STO wörld ST OP"


def test_the_cache_holds_what_the_formula_says() -> None:
    spec = ModelSpec.model_validate({"layers": 3, "hidden": 24, "heads": 6, "kv_heads": 3, "vocab": 50})
    a = resolve_architecture(spec, sequence_length=8, tokenizer_vocab=None)
    places = Places(torch.zeros(5, dtype=torch.int64))
    caches = [LayerCache.empty(places, 17, 2, a.head_dim, torch.bfloat16) for _ in range(3)]
    estimated = cache_bytes(a, tp=2, index=0, layers=3, sequences=5, positions=17, dtype="bf16")
    assert sum(cache.num_bytes for cache in caches) == estimated


@pytest.mark.parametrize("starts", [[0, 0], [2, 2], [1, 4]])
@pytest.mark.parametrize("count", [1, 3])
def test_a_query_sees_its_own_past_and_nothing_else(starts: list[int], count: int) -> None:
    places = Places(torch.zeros(2, dtype=torch.int64))
    cache = LayerCache.empty(places, 8, 1, 4, torch.float32)
    cache.keys.fill_(torch.nan)  # what nobody has written
    places.move(starts)
    new = torch.ones(count, 2, 1, 4)
    keys, _ = cache.extend(new, new)
    mask = cache.mask(count)
    length = len(keys)
    if "attn_mask" in mask:
        seen = mask["attn_mask"].expand(2, 1, count, length)[:, 0]
    elif mask.get("is_causal"):
        seen = torch.ones(count, length).tril(length - count).bool().expand(2, -1, -1)
    else:
        seen = torch.ones(2, count, length, dtype=torch.bool)
    for row, start in enumerate(starts):
        for query in range(count):
            assert seen[row, query].nonzero().flatten().tolist() == list(range(start + query + 1))
