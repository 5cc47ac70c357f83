"""Exchange with Hugging Face directories: names, configs, there and back, shards, hostile and broken directories."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardwright.checkpoint.exchange import export as exporting
from shardwright.checkpoint.exchange.companions import MAX_BYTES, Copied, complete_tokenizer, copy_companions
from shardwright.checkpoint.exchange.export import export, shards
from shardwright.checkpoint.exchange.families import family_of, stored_tensors
from shardwright.checkpoint.exchange.hugging_face import HuggingFaceWeights
from shardwright.checkpoint.files import Entry
from shardwright.data.tokenizer import BytesTokenizer, load_tokenizer
from shardwright.errors import CheckpointError, RecipeError, ShardwrightError
from shardwright.layout.box import Box, GlobalTensor
from shardwright.nn.decoder import Decoder
from shardwright.nn.initial import Seeded
from shardwright.nn.parameters import pieces_of
from shardwright.spec.architecture import Architecture, resolve_architecture
from shardwright.spec.hf_export import hf_config
from shardwright.spec.model import ModelSpec

SMALL: dict[str, Any] = {"layers": 2, "hidden": 16, "heads": 4, "kv_heads": 2, "ffn": 24, "vocab": 37}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_positions": 32}
GPT2: dict[str, Any] = SMALL | {
    "kv_heads": 4,
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu",
    "bias": True,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "llama tied, scaled": ("llama", SMALL | {"tied_embeddings": True, "rope_scaling": SCALING, "rope_theta": 5e5}),
    "llama biased": ("llama", SMALL | {"bias": True, "head_dim": 8}),
    "mistral": ("mistral", SMALL | {"head_dim": 6, "norm_eps": 1e-6}),
    "qwen2": ("qwen2", SMALL | {"qkv_bias": True, "tied_embeddings": True}),
    "qwen3": ("qwen3", SMALL | {"qk_norm": True, "head_dim": 6, "init_std": 0.01}),
    "gpt2": ("gpt2", GPT2 | {"tied_embeddings": True}),
    "gpt2 untied": ("gpt2", GPT2 | {"max_positions": 64}),
}
FAMILIES = pytest.mark.parametrize(("family", "model"), MODELS.values(), ids=MODELS.keys())


def architecture_of(**fields: Any) -> Architecture:
    spec = ModelSpec.model_validate(fields)
    return resolve_architecture(spec, sequence_length=48, tokenizer_vocab=None)


def tensors_of(architecture: Architecture) -> list[GlobalTensor]:
    with torch.device("meta"):
        model = Decoder(architecture)
    return [piece.box.tensor for pieces in pieces_of(model).values() for piece in pieces]


def read(values: Any, tensor: GlobalTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(tensor.shape, dtype=dtype)
    values.read(Box.whole(tensor), out)
    return out


def base_of(family: str) -> dict[str, Any]:
    return {"model_type": family}


def write_seeded(directory: Path, family: str, architecture: Architecture, **options: Any) -> None:
    export(Seeded(3), architecture, directory, base_config=base_of(family), **options)


# Families and configs


@FAMILIES
def test_a_family_stores_every_tensor_of_the_model_and_fills_its_own(family: str, model: dict[str, Any]) -> None:
    architecture = architecture_of(**model)
    stored = stored_tensors(architecture, family)
    assert sorted((one.ours, one.our_shape) for one in stored) == sorted(
        (tensor.name, tensor.shape) for tensor in tensors_of(architecture)
    )
    shapes = {one.name: one.shape for one in stored}
    held = {name: 0 for name in shapes}
    for one in stored:
        held[one.name] += torch.Size(one.our_shape).numel()
    assert held == {name: torch.Size(shape).numel() for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("model", "family"),
    [
        (SMALL, "llama"),
        (SMALL | {"bias": True}, "llama"),
        (SMALL | {"bias": True, "qkv_bias": True}, "llama"),
        (SMALL | {"qkv_bias": True}, "qwen2"),
        (SMALL | {"qk_norm": True}, "qwen3"),
        (SMALL | {"hidden": 18, "head_dim": 4}, "mistral"),  # transformers' Llama wants heads that divide hidden
        (GPT2, "gpt2"),
    ],
)
def test_the_family_follows_from_the_architecture(model: dict[str, Any], family: str) -> None:
    assert family_of(architecture_of(**model)) == family


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (SMALL | {"activation": "gelu"}, 'model.activation: "gelu" has no form in the Hugging Face family llama'),
        (SMALL | {"norm": "layernorm"}, 'model.positions: "rotary" has no form in the Hugging Face family gpt2'),
        (GPT2 | {"kv_heads": 2}, "model.kv_heads: 2 has no form in the Hugging Face family gpt2"),
        (
            GPT2 | {"bias": False},
            "model.bias: false has no form in the Hugging Face family gpt2, which has bias = true",
        ),
        (SMALL | {"qk_norm": True, "qkv_bias": True}, "model.qkv_bias: true has no form .* family qwen3"),
        (SMALL | {"hidden": 18, "head_dim": 4, "bias": True}, "model.hidden: 18 has no form .* family llama"),
    ],
)
def test_what_no_family_can_express_is_refused(model: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=problem) as caught:
        export(Seeded(0), architecture_of(**model), tmp_path / "out")
    assert "a checkpoint of Shardwright's own" in (caught.value.way_out or "")
    assert list(tmp_path.iterdir()) == []


@FAMILIES
def test_a_config_reads_back_as_the_same_architecture(family: str, model: dict[str, Any], tmp_path: Path) -> None:
    architecture = architecture_of(**model)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(architecture, family, None, "float32")))
    assert architecture_of(config=str(tmp_path)) == architecture


def test_a_config_keeps_what_it_came_with_and_no_contradiction() -> None:
    architecture = architecture_of(**SMALL)
    base = {
        "model_type": "mistral",
        "architectures": ["MistralModel"],
        "bos_token_id": 5,
        "eos_token_id": [6, 7],
        "hidden_size": 9999,
        "sliding_window": 4096,
        "rope_parameters": {"rope_theta": 1.0, "rope_type": "yarn"},
        "dtype": "float16",
        "quantization_config": {"bits": 4},
        "use_cache": False,
    }
    written = hf_config(architecture, "mistral", base, "bfloat16")
    assert (written["bos_token_id"], written["eos_token_id"], written["use_cache"]) == (5, [6, 7], False)
    assert written["architectures"] == ["MistralForCausalLM"]
    assert (written["hidden_size"], written["rope_theta"], written["torch_dtype"]) == (16, 10000.0, "bfloat16")
    assert written["sliding_window"] == 4096  # no sequence of 48 outgrows it
    assert not {"rope_parameters", "dtype", "quantization_config"} & set(written)
    assert hf_config(architecture, "mistral", base | {"sliding_window": 32}, "bfloat16")["sliding_window"] is None


def test_a_qwen_window_goes_with_all_that_describes_it() -> None:
    architecture = architecture_of(**SMALL, qk_norm=True)
    sliding = ["full_attention", "sliding_attention"]
    base = {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 48, "layer_types": sliding}
    assert hf_config(architecture, "qwen3", base, "float32")["layer_types"] == sliding
    written = hf_config(architecture, "qwen3", base | {"sliding_window": 47}, "float32")
    assert (written["use_sliding_window"], written["sliding_window"]) == (False, None)
    assert "layer_types" not in written


# There and back


@FAMILIES
def test_what_is_exported_is_imported_to_the_bit(family: str, model: dict[str, Any], tmp_path: Path) -> None:
    architecture = architecture_of(**model)
    first, second = tmp_path / "first", tmp_path / "second"
    write_seeded(first, family, architecture)
    values = HuggingFaceWeights(first, architecture)
    for tensor in tensors_of(architecture):
        expected = torch.empty(tensor.numel)
        Seeded(3).read(Box.whole(tensor), expected)
        assert torch.equal(read(values, tensor).view(-1), expected), tensor.name
    export(values, architecture, second, base_config=values.config, source_dtype=values.dtype)
    assert HuggingFaceWeights(second, architecture).config == values.config
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@FAMILIES
def test_any_box_is_its_part_of_the_whole(family: str, model: dict[str, Any], tmp_path: Path) -> None:
    architecture = architecture_of(**model)
    write_seeded(tmp_path / "out", family, architecture)
    values = HuggingFaceWeights(tmp_path / "out", architecture)
    for tensor in tensors_of(architecture):
        box = Box(tensor, tuple(n // 3 for n in tensor.shape), tuple(n - n // 3 - n // 4 for n in tensor.shape))
        for dtype in (torch.float64, torch.bfloat16):
            out = torch.empty(box.numel, dtype=dtype)  # flat, as buffers are
            values.read(box, out)
            assert torch.equal(out.view(box.size), read(values, tensor)[box.slices()].to(dtype)), tensor.name


def test_gpt2_lies_turned_and_fused(tmp_path: Path) -> None:
    architecture = architecture_of(**GPT2)
    write_seeded(tmp_path / "out", "gpt2", architecture)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    values = HuggingFaceWeights(tmp_path / "out", architecture)
    by_name = {tensor.name: read(values, tensor) for tensor in tensors_of(architecture)}
    for what in ("weight", "bias"):
        parts = [by_name[f"layers.1.attention.{part}.{what}"] for part in "qkv"]
        fused = torch.cat(parts)
        assert torch.equal(stored[f"transformer.h.1.attn.c_attn.{what}"], fused.T if what == "weight" else fused)
    assert torch.equal(stored["transformer.h.0.mlp.c_fc.weight"], by_name["layers.0.mlp.up.weight"].T)


def renamed(directory: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    path = directory / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    path.unlink()
    save_file(dict(change(tensors)), path)


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("qwen2", "model.")])
def test_names_without_prefix_buffers_and_a_repeated_head_are_read_alike(
    name: str, prefix: str, tmp_path: Path
) -> None:
    family, model = MODELS[name]
    architecture = architecture_of(**model)
    write_seeded(tmp_path / "out", family, architecture)
    before = [read(HuggingFaceWeights(tmp_path / "out", architecture), one) for one in tensors_of(architecture)]

    def older(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        buffers = ("h.0.attn.bias", "h.0.attn.masked_bias", "layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight")
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()} | {
            buffer: torch.ones(2) for buffer in buffers
        }

    renamed(tmp_path / "out", older)
    after = [read(HuggingFaceWeights(tmp_path / "out", architecture), one) for one in tensors_of(architecture)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_snapshot_of_links_is_read(tmp_path: Path) -> None:
    architecture = architecture_of(**SMALL)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    write_seeded(tmp_path / "out", "llama", architecture, max_shard_bytes=4096)
    snapshot.mkdir(parents=True)
    (tmp_path / "out").rename(blobs)
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    tensor = tensors_of(architecture)[0]
    expected = torch.empty(tensor.numel)
    Seeded(3).read(Box.whole(tensor), expected)
    assert torch.equal(read(HuggingFaceWeights(snapshot, architecture), tensor).view(-1), expected)


# Shards and memory


def test_shards_are_full_runs() -> None:
    entries = [Entry(str(n), torch.float32, (n,)) for n in (2, 3, 9, 1, 1)]
    assert [[entry.key for entry in run] for run in shards(entries, 20)] == [["2", "3"], ["9"], ["1", "1"]]


def test_shards_hold_every_tensor_once_and_say_where(tmp_path: Path) -> None:
    architecture = architecture_of(**MODELS["gpt2"][1])
    told: list[int] = []
    write_seeded(tmp_path / "whole", "gpt2", architecture)
    write_seeded(tmp_path / "out", "gpt2", architecture, max_shard_bytes=8000, progress=told.append)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    found: dict[str, Tensor] = {}
    for name in files:
        shard = load_file(tmp_path / "out" / name)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 8000
        assert {index["weight_map"][key] for key in shard} == {name}
        assert not set(shard) & set(found)
        found |= shard
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert index["metadata"]["total_size"] == sum(told) == sum(tensor.nbytes for tensor in whole.values())


def test_the_dtype_of_the_weights_is_chosen_or_the_source_s(tmp_path: Path) -> None:
    architecture = architecture_of(**SMALL)
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (None, "float64")):
        out = tmp_path / name
        export(Seeded(0), architecture, out, dtype=dtype, source_dtype=torch.float64)
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == name
        assert str(HuggingFaceWeights(out, architecture).dtype) == f"torch.{name}"


def peak_resident(job: Callable[[], None]) -> int:
    """Bytes by which the job's peak of resident memory is above what was there before it."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) << 10

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = status("VmRSS")
    job()
    return status("VmHWM") - before


def test_an_export_has_one_tensor_in_memory(tmp_path: Path) -> None:
    class Zeros:
        def read(self, box: Box, out: Tensor) -> None:
            out.zero_()

    architecture = architecture_of(**GPT2 | {"layers": 6, "hidden": 1024, "vocab": 4096})
    largest, total = 4096 * 1024 * 4, architecture.num_parameters * 4
    export(Zeros(), architecture_of(**GPT2), tmp_path / "first")  # whatever is imported and made ready only once
    peak = peak_resident(lambda: export(Zeros(), architecture, tmp_path / "out") and None)
    assert peak < 2 * largest < total / 3


def test_reading_a_box_touches_its_own_pages(tmp_path: Path) -> None:
    architecture = architecture_of(**SMALL | {"vocab": 1 << 22})  # 256 MiB each of embedding and head, on no disk
    names = [(one.name, one.shape) for one in stored_tensors(architecture, "llama")]
    header: dict[str, Any] = {}
    end = 0
    for name, shape in names:
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(architecture, "llama", None, "float32")))

    def read_rows() -> None:
        values = HuggingFaceWeights(tmp_path, architecture)
        tensor = GlobalTensor("head.output.weight", (1 << 22, 16))
        values.read(Box(tensor, (1 << 20, 0), (1000, 16)), torch.empty(16000))

    assert peak_resident(read_rows) < 32 << 20


# Directories that are broken, foreign or hostile

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Bad:
    """How a good directory of shards, or of one file, is spoiled; what is said about it."""

    spoil: Change
    problem: str
    way_out: str
    sharded: bool = False


def dropped(key: str) -> Change:
    return lambda path: renamed(path, lambda t: {name: tensor for name, tensor in t.items() if name != key})


def added(**tensors: Tensor) -> Change:
    return lambda path: renamed(path, lambda t: t | tensors)


def indexed(**places: Any) -> Change:
    def change(path: Path) -> None:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        index["weight_map"] |= places
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def cut_short(path: Path) -> None:
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 1)


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def to_half_bytes(path: Path) -> None:
    renamed(path, lambda tensors: {key: tensor.to(torch.int8) for key, tensor in tensors.items()})


def replaced(name: str, text: str) -> Change:
    return lambda path: (path / name).write_text(text)


def linked(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("/etc/passwd")


def piped(path: Path) -> None:
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


INDEX = "model.safetensors.index.json"
BAD = {
    "cut short": Bad(cut_short, "model.safetensors: not a whole safetensors file", "another copy"),
    "garbage": Bad(replaced("model.safetensors", "x" * 100), "not a whole safetensors file", "another copy"),
    "empty": Bad(replaced("model.safetensors", ""), "not a whole safetensors file", "another copy"),
    "pickle": Bad(pickled, "has pytorch_model.bin .* nothing is unpickled here", "safe_serialization=True"),
    "nothing": Bad(lambda p: (p / "model.safetensors").unlink(), "has neither model.safetensors nor", "give a model"),
    "missing": Bad(dropped("model.norm.weight"), "DIR: model.norm.weight is not there", "another copy"),
    "no head": Bad(dropped("lm_head.weight"), "lm_head.weight is not there", "model.tied_embeddings = true"),
    "extra": Bad(
        added(**{f"x{i}.scale": torch.ones(1) for i in range(5)}),
        r"DIR: x0.scale, x1.scale, x2.scale and 2 more are not part of this model",
        "must describe the model whose weights these are",
    ),
    "twice": Bad(added(**{"norm.weight": torch.ones(16)}), "norm.weight of .* is also model.norm.weight of", "another"),
    "vocabulary": Bad(
        added(**{"model.embed_tokens.weight": torch.ones(40, 16)}),
        r"DIR: model.embed_tokens.weight is \[40, 16\] in its file, and \[model\] wants \[37, 16\]",
        "such as model.vocab = 40",
    ),
    "shape": Bad(
        added(**{"model.layers.1.mlp.down_proj.weight": torch.ones(24, 16)}),
        r"model.layers.1.mlp.down_proj.weight is \[24, 16\] in its file, and \[model\] wants \[16, 24\]",
        "the sizes of its config.json",
    ),
    "quantised": Bad(to_half_bytes, "model.embed_tokens.weight is stored as int8", "quantised weights are not read"),
    "a secret": Bad(linked, "leads to /etc/passwd: not a whole safetensors file", "another copy"),
    "a pipe": Bad(piped, "model.safetensors: no such regular file", "another copy"),
    "no config": Bad(lambda p: (p / "config.json").unlink(), "config.json: no such file", "another copy"),
    "deep config": Bad(replaced("config.json", "[" * 100_000), "config.json: not JSON", "another copy"),
    "list": Bad(replaced("config.json", "[]"), "config.json: not a JSON object", "another copy"),
    "index not JSON": Bad(replaced(INDEX, "{"), "index.json: not JSON", "another copy", sharded=True),
    "index empty": Bad(replaced(INDEX, "{}"), '"weight_map" does not say', "another copy", sharded=True),
    "index of numbers": Bad(indexed(a=3), '"weight_map" does not say', "another copy", sharded=True),
    "up": Bad(indexed(a="../x.safetensors"), "names '../x.safetensors'", "beside it", sharded=True),
    "absolute": Bad(indexed(a="/x.safetensors"), "names '/x.safetensors'", "beside it", sharded=True),
    "NUL": Bad(indexed(a="\0.safetensors"), "names '.x00.safetensors'", "beside it", sharded=True),
    "other kind": Bad(indexed(a="pytorch_model.bin"), "names 'pytorch_model.bin'", "beside it", sharded=True),
    "long": Bad(indexed(a="a" * 5000 + ".safetensors"), "no such regular file", "another copy", sharded=True),
    "no shard": Bad(indexed(a="b.safetensors"), "b.safetensors: no such regular file", "another copy", sharded=True),
    "not in it": Bad(
        indexed(a="model-00001-of-00003.safetensors"), "places a in .* does not have it", "another", sharded=True
    ),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_directory_is_one_clear_error(bad: Bad, tmp_path: Path) -> None:
    architecture, path = architecture_of(**SMALL), tmp_path / "model"
    write_seeded(path, "llama", architecture, **{"max_shard_bytes": 8000} if bad.sharded else {})
    HuggingFaceWeights(path, architecture)  # which was good
    bad.spoil(path)
    with pytest.raises(CheckpointError, match=bad.problem.replace("DIR", str(path))) as caught:
        read(HuggingFaceWeights(path, architecture), GlobalTensor("embedding.tokens.weight", (37, 16)))
    assert bad.way_out in (caught.value.way_out or "")
    assert str(path) in caught.value.problem
    assert "root:" not in str(caught.value)


def test_mathematics_that_is_not_built_is_refused(tmp_path: Path) -> None:
    architecture = architecture_of(**SMALL)
    write_seeded(tmp_path / "out", "llama", architecture)
    config = json.loads((tmp_path / "out" / "config.json").read_text()) | {"hidden_act": "relu"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match='hidden_act = "relu" is not built'):
        HuggingFaceWeights(tmp_path / "out", architecture)


def test_an_own_output_matrix_is_not_dropped(tmp_path: Path) -> None:
    write_seeded(tmp_path / "out", "llama", architecture_of(**SMALL))
    with pytest.raises(CheckpointError, match=r"has an output matrix of its own, and model.tied_embeddings = true"):
        HuggingFaceWeights(tmp_path / "out", architecture_of(**SMALL, tied_embeddings=True))


def test_a_tensor_of_another_model_is_not_read(tmp_path: Path) -> None:
    write_seeded(tmp_path / "out", "llama", architecture_of(**SMALL))
    values = HuggingFaceWeights(tmp_path / "out", architecture_of(**SMALL))
    with pytest.raises(CheckpointError, match=r"nobody.weight \[3\] is asked for, and there is no such tensor"):
        read(values, GlobalTensor("nobody.weight", (3,)))
    with pytest.raises(CheckpointError, match=r"head.norm.weight \[3\] is asked for, and there is \[16\]"):
        read(values, GlobalTensor("head.norm.weight", (3,)))


# What an export leaves


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    class Fails(Seeded):
        def read(self, box: Box, out: Tensor) -> None:
            if box.name == "head.norm.weight":
                raise ShardwrightError("gone")
            super().read(box, out)

    with pytest.raises(ShardwrightError, match="gone"):
        export(Fails(0), architecture_of(**SMALL), tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_is_an_error_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_json", full)
    with pytest.raises(CheckpointError, match="out: cannot be written: No space left on device"):
        export(Seeded(0), architecture_of(**SMALL), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    architecture = architecture_of(**SMALL)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for name in ("file", "full", "link"):
        with pytest.raises(CheckpointError, match=f"{name}: is there already"):
            export(Seeded(0), architecture, tmp_path / name)
    done = export(Seeded(0), architecture, tmp_path / "empty")
    assert done.files == ("config.json", "model.safetensors")
    assert done.num_bytes == 4 * architecture.num_parameters


# Companions


def test_companions_are_files_of_the_directory(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (tmp_path / "secret.json").write_text("{}")
    (source / "tokenizer.json").write_text("mine")
    (source / "vocab.json").symlink_to("../secret.json")
    (source / "merges.txt").mkdir()
    (source / "model.safetensors").write_text("weights")
    (source / "notes.txt").write_text("not a companion")
    with (source / "tokenizer.model").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert copy_companions(source, target) == Copied(
        ("tokenizer.json",),
        (
            f"vocab.json is not a regular file of {source}",
            f"merges.txt is not a regular file of {source}",
            f"tokenizer.model has {MAX_BYTES + 1} bytes, more than {MAX_BYTES}",
        ),
    )
    assert [path.name for path in target.iterdir()] == ["tokenizer.json"]


def test_companions_of_a_cache_snapshot_are_copied(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    for folder in (snapshot, tmp_path / "hub" / "blobs", tmp_path / "target"):
        folder.mkdir(parents=True)
    (tmp_path / "hub" / "blobs" / "123").write_text("mine")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    assert copy_companions(snapshot, tmp_path / "target").names == ("tokenizer.json",)
    assert not (tmp_path / "target" / "tokenizer.json").is_symlink()


def test_an_export_takes_companions_along_and_tells_what_it_left(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "config.json"):
        (source / name).write_text(f'{{"of": "{name}"}}')
    (source / "vocab.json").mkdir()
    base = {"model_type": "mistral", "eos_token_id": 9}
    done = export(Seeded(0), architecture_of(**SMALL), tmp_path / "out", base_config=base, companions=source)
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"of": "generation_config.json"}'
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"], done.family) == ("mistral", 9, "mistral")
    assert done.notes == (f"vocab.json is not a regular file of {source}",)


TEXTS = ["", "Hello  wörld \n it 's\t, ok", "\0\x7f<|endoftext|>", "e\u0301 \U0001f600 \u200b", "日本語" * 20]


def test_bytes_become_a_tokenizer_json_with_the_same_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    ours = BytesTokenizer()
    ours.save(tmp_path)
    assert complete_tokenizer(tmp_path, 48) == {"bos_token_id": 256, "eos_token_id": 256}
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == 257
    assert theirs.encode("a<|endoftext|>").ids == [97, 256]
    theirs.encode_special_tokens = True  # what tokenizer_config.json asks for
    every = ["".join(map(chr, range(begin, begin + 400))) for begin in range(0, 0xD000, 400)]
    for text in TEXTS + every:
        assert theirs.encode(text).ids == ours.encode(text).tolist()
        assert theirs.decode(theirs.encode(text).ids) == text


def test_a_tokenizer_with_its_own_files_is_left_alone(tmp_path: Path) -> None:
    BytesTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert complete_tokenizer(tmp_path, 48) == {}
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_learned_tokenizer_names_its_separator(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bpe:300", documents=["some text, some more text"])
    tokenizer.save(tmp_path)
    ids = complete_tokenizer(tmp_path, 48)
    assert ids == {"bos_token_id": tokenizer.separator, "eos_token_id": tokenizer.separator}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["split_special_tokens"]) == ("<|endoftext|>", True)
