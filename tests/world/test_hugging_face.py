"""transformers as the judge: its weights give its logits here under every layout, and ours give ours there."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange_worker import Told, train_from
from layouts import plan_of
from pool import Pool
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from shardwright.checkpoint.exchange.export import export
from shardwright.checkpoint.exchange.families import family_of
from shardwright.checkpoint.exchange.hugging_face import HuggingFaceWeights
from shardwright.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer
from shardwright.layout.box import Box
from shardwright.nn.attention import rotary_frequencies
from shardwright.nn.decoder import Decoder
from shardwright.nn.initial import Seeded, Values
from shardwright.nn.parameters import pieces_of
from shardwright.spec.architecture import Architecture, resolve_architecture
from shardwright.spec.model import ModelSpec

pytestmark = pytest.mark.world

BAR = 1e-5  # on logits of a few units, in fp32
POSITIONS = 13
VOCAB = 101
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Wavelengths 6, 20, 63 and 199: one is kept, one lies between, two are stretched.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 64}
DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama-3": {"model_type": "llama", **SIZES, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "llama-biased": {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": None, "head_dim": 12},
    "qwen2": {"model_type": "qwen2", **SIZES},
    "qwen2-tied": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 10},
    "gpt2": {"model_type": "gpt2", **GPT2, **DRY},
    "gpt2-untied": {"model_type": "gpt2", **GPT2, **DRY, "tie_word_embeddings": False},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {"dp": 1},
    "tp2": {"tp": 2, "sequence_parallel": False},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2-tp2-sp": {"pp": 2, "tp": 2, "sequence_parallel": True},
    "dp2-zero3-tp2": {"dp": 2, "zero": 3, "tp": 2, "sequence_parallel": False},
}
CASES = [
    *((model, "one rank") for model in MODELS),
    *((model, "tp2") for model in ("llama-3", "llama-biased", "mistral", "qwen2", "qwen3", "gpt2")),
    *((model, "pp2") for model in ("llama-3", "mistral", "qwen2-tied", "qwen3", "gpt2-untied")),
    *(("llama", layout) for layout in ("tp2-sp", "dp2-zero3-tp2")),
    *((model, "pp2-tp2-sp") for model in ("llama-3", "gpt2")),
]


@dataclass(frozen=True)
class Original:
    """A model that transformers saved, and its logits [sequences, positions, vocabulary]."""

    path: Path
    logits: Tensor


@dataclass
class Boxes:
    """`Values` from boxes that ranks own."""

    parts: dict[str, list[tuple[Box, Tensor]]] = field(default_factory=dict)

    @staticmethod
    def of(told: list[Told]) -> Boxes:
        boxes = Boxes()
        for box, values in (one for rank in told for one in rank.owned):
            boxes.parts.setdefault(box.name, []).append((box, values))
        return boxes

    def read(self, box: Box, out: Tensor) -> None:
        whole = torch.full(box.tensor.shape, torch.nan)
        for part, values in self.parts[box.name]:
            assert part.tensor.shape == box.tensor.shape
            whole[part.slices()] = values.float()
        out.view(box.size).copy_(whole[box.slices()])
        assert not out.isnan().any(), f"nobody owns a part of {box}"


def tokens() -> Tensor:
    return torch.randint(VOCAB, (3, POSITIONS), generator=torch.Generator().manual_seed(1))


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def loaded(path: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, nothing unexpected, nothing of another shape
    return model


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Original]]:
    """Random models; their norms and biases too, so that no two tensors can be taken for each other."""
    folder = tmp_path_factory.mktemp("originals")
    made = {}
    for name, fields in MODELS.items():
        torch.manual_seed(0)
        own = dict(fields)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(own.pop("model_type"), **own))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                is_norm = parameter.dim() == 1 and key.endswith("weight")
                parameter.normal_(mean=float(is_norm), std=0.2)
        model.save_pretrained(folder / name)
        made[name] = Original(folder / name, logits_of(model))
    yield made


def ours(normed: list[Tensor | None], values: Values, architecture: Architecture) -> Tensor:
    """Logits from what the final norm gave on the ranks at the end of the pipeline, and the output matrix."""
    parts = [part for part in normed if part is not None]
    shared = len(parts[0]) < POSITIONS  # sequence parallelism: each rank has some of the positions
    normed_TBC = (torch.cat(parts) if shared else parts[0])[:POSITIONS]
    name = "embedding.tokens.weight" if architecture.tied_embeddings else "head.output.weight"
    weight = torch.empty(architecture.vocab, architecture.hidden)
    values.read(Box.whole(next(tensor for tensor in tensors_of(architecture) if tensor.name == name)), weight)
    return (normed_TBC @ weight.T).transpose(0, 1)


def tensors_of(architecture: Architecture) -> list[Any]:
    with torch.device("meta"):
        model = Decoder(architecture)
    return [piece.box.tensor for pieces in pieces_of(model).values() for piece in pieces]


def distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max())


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_are_theirs_before_training_and_after_it(
    name: str, layout: str, pool: Pool, originals: dict[str, Original], tmp_path: Path
) -> None:
    original = originals[name]
    plan = plan_of({"config": str(original.path)}, LAYOUTS[layout], dtype="fp32", sequence_length=POSITIONS)
    told = pool.run(plan.world_size, train_from, plan, original.path, tokens())
    imported = HuggingFaceWeights(original.path, plan.architecture)
    assert distance(ours([one.before for one in told], imported, plan.architecture), original.logits) < BAR

    trained = Boxes.of(told)
    export(trained, plan.architecture, tmp_path / "out", base_config=imported.config, max_shard_bytes=20_000)
    theirs, after = loaded(tmp_path / "out"), ours([one.after for one in told], trained, plan.architecture)
    assert type(theirs).__name__ == imported.config["architectures"][0]
    assert distance(logits_of(theirs), after) < BAR
    assert distance(original.logits, after) > 100 * BAR


SEEDED: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": {"factor": 4.0, "original_max_positions": 16}, "rope_theta": 500.0},
    "mistral": {"hidden": 30, "head_dim": 6},
    "qwen2": {"qkv_bias": True, "tied_embeddings": True},
    "qwen3": {"qk_norm": True},
    "gpt2": {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True, "kv_heads": 4},
}


@pytest.mark.parametrize(("family", "model"), SEEDED.items(), ids=SEEDED.keys())
def test_a_model_of_our_own_is_read_by_transformers(family: str, model: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 40, "vocab": VOCAB}
    spec = ModelSpec.model_validate(sizes | {"max_positions": 64, "init_std": 0.2} | model)
    architecture = resolve_architecture(spec, sequence_length=POSITIONS, tokenizer_vocab=None)
    assert family_of(architecture) == family
    decoder = Decoder(architecture)
    for parameter, pieces in pieces_of(decoder).items():
        for piece in pieces:
            Seeded(0).read(piece.box, parameter.data.view(-1)[piece.start : piece.stop])
    export(Seeded(0), architecture, tmp_path / "out")
    theirs = loaded(tmp_path / "out")
    with torch.no_grad():
        assert distance(logits_of(theirs), decoder.logits(tokens())) < BAR
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (None, None)
    if architecture.rope_scaling is not None:
        assert theirs.config.rope_parameters["rope_type"] == "llama3"
        frequencies = theirs.get_submodule("model.rotary_emb").inv_freq
        assert torch.allclose(frequencies, rotary_frequencies(architecture).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", SEEDED)
@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_our_tokenizers_are_read_by_transformers(spec: str, family: str, tmp_path: Path) -> None:
    text = "Hello  wörld \n it's\t, ok 1234 <|endoftext|> cafe\u0301 日本語"
    tokenizer: Tokenizer = BytesTokenizer() if spec == "bytes" else load_tokenizer(spec, documents=[text] * 2)
    (tmp_path / "companions").mkdir()
    tokenizer.save(tmp_path / "companions")
    sizes = {"layers": 1, "hidden": 8, "heads": 4, "vocab": tokenizer.vocab_size} | SEEDED[family]
    architecture = resolve_architecture(
        ModelSpec.model_validate(sizes | {"hidden": 8, "max_positions": 64}), sequence_length=8, tokenizer_vocab=None
    )
    base = {"model_type": family}
    done = export(Seeded(0), architecture, tmp_path / "out", base_config=base, companions=tmp_path / "companions")
    replaced = family == "qwen2"
    assert any("PreTrainedTokenizerFast" in note for note in done.notes) == replaced
    theirs = (PreTrainedTokenizerFast if replaced else AutoTokenizer).from_pretrained(tmp_path / "out")
    assert theirs(text).input_ids == tokenizer.encode(text).tolist()
    assert theirs.decode(theirs(text).input_ids) == text
    assert theirs.eos_token_id == tokenizer.separator
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.separator
