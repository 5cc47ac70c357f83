"""Before anything is generated: the model found, its layout resolved, its tokenizer read, the prompts checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shardwright.checkpoint.exchange.companions import CONFIG, read_companion
from shardwright.checkpoint.exchange.hugging_face import HuggingFaceWeights
from shardwright.checkpoint.load import Checkpoint
from shardwright.comm.machine import computes_bf16
from shardwright.data.tokenizer import Tokenizer, load_tokenizer
from shardwright.errors import DataError, LayoutError, RunError
from shardwright.infer.settings import Settings
from shardwright.infer.text import Ends
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.hf_config import read_config
from shardwright.spec.load import apply_override, build
from shardwright.spec.origin import Origin, origin_of
from shardwright.spec.spec import Spec

FIELD = "generate"
_GENERATION = "generation_config.json"
_STOPPING = "1 s"  # a rank that is asked to stop has nothing to save
_UNREAD = (
    *("data.", "train.", "memory.", "checkpoint."),
    *("parallel.pipeline_schedule", "parallel.zero_pipeline", "run.max_restarts", "run.trackers"),
)
_READ = ("data.separator", "train.dtype")
_OF_MODEL = ("max_positions", "rope_theta", "rope_scaling", "norm_eps")
"""What may be told anew of a model whose weights are there: how its positions and norms compute."""


@dataclass(frozen=True)
class Request:
    """What was asked of `generate`. `origins`: where each prompt was given. `batch_size`: prompts at a time on each
    data rank; `groups`: into how many parts a batch is cut, 0: as many as the pipeline has stages."""

    source: str
    overrides: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    batch_size: int = 16
    groups: int = 0
    out: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RunError(f"--batch-size: {self.batch_size} is not at least 1", "give 1 or more")
        if self.groups < 0:
            raise RunError(f"--microbatches: {self.groups} is negative", "0 takes as many as there are stages")
        if not self.prompts:
            raise RunError("--prompt: none was given", 'give --prompt "...", or --prompts FILE.jsonl with a line each')

    def to_json(self) -> str:
        """The request as a rank gets it."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Request:
        """The request that `to_json` wrote."""
        fields = json.loads(text)
        settings = fields["settings"] | {"stop": tuple(fields["settings"]["stop"])}
        lists = {name: tuple(fields[name]) for name in ("overrides", "prompts", "origins")}
        return Request(**fields | lists | {"settings": Settings(**settings)})


def spec_of(source: str, overrides: Sequence[str]) -> Spec:
    """The recipe that generation stands for: the model that lies there, on one rank unless overrides say otherwise.

    Raises ShardwrightError.
    """
    origin, directory = origin_of(source, FIELD)
    model: dict[str, Any] = {"init_from": source}
    if origin is Origin.HUGGING_FACE:
        most = read_config(directory, FIELD).whole_window
        if most is not None:
            model["max_positions"] = most
    tables: dict[str, Any] = {
        "model": model,
        "data": {"corpus": "random"},
        "train": {"sequence_length": 1, "micro_batch_size": 1},
        "parallel": {"dp": 1, "zero": 0, "sequence_parallel": False},
        "checkpoint": {"every": 0},
        "run": {"grace_period": _STOPPING},
    }
    for override in overrides:
        _check_is_read(override)
        apply_override(tables, override)
    dp = tables["parallel"].get("dp") if isinstance(tables["parallel"], dict) else 1
    tables["train"]["global_batch_size"] = dp if isinstance(dp, int) else 1
    spec = build(tables)
    if spec.parallel.sequence_parallel and spec.parallel.tp > 1:
        raise LayoutError(
            "parallel.sequence_parallel: true, and a new token is one position, which cannot be sharded",
            "leave it out: generation uses the all-reduce form",
        )
    if spec.parallel.virtual_stages > 1:
        raise LayoutError(
            f"parallel.virtual_stages: generation has one stage on each rank, not {spec.parallel.virtual_stages}",
            "leave it out",
        )
    return spec


def _check_is_read(override: str) -> None:
    """Raises RunError for a field of training, which would change nothing here, or of another model."""
    name = "".join(override.partition("=")[0].split())
    if f"{name}.".startswith("model.") and name.removeprefix("model.").partition(".")[0] not in _OF_MODEL:
        raise RunError(
            f"{name}: the model is the one that lies there",
            f"leave it out: of [model], {FIELD} reads {', '.join(_OF_MODEL)}",
        )
    if f"{name}.".startswith(_UNREAD) and name not in _READ:
        raise RunError(
            f"{name}: only training reads it",
            f"leave it out: {FIELD} reads {', '.join(_READ)} and the layout in [parallel]; see also --batch-size",
        )


def plan_of(spec: Spec, world_size: int, device: str) -> Plan:
    """The plan of `spec_of` on so many ranks. Raises ShardwrightError."""
    own = "cuda" if device == "cuda" else "cpu"
    return resolve(spec, world_size=world_size, device=own, native_bf16=computes_bf16(own), tokenizer_vocab=None)


def companions_of(source: str) -> Path:
    """The directory of the small files that travel with the weights."""
    origin, directory = origin_of(source, FIELD)
    return Checkpoint.open(directory).companions if origin is Origin.CHECKPOINT else directory


def look_at_weights(source: str, plan: Plan) -> None:
    """Raises ShardwrightError where the weights are not those of the plan's model, as far as their headers tell."""
    origin, directory = origin_of(source, FIELD)
    if origin is Origin.HUGGING_FACE:
        _ = HuggingFaceWeights(directory, plan.architecture, FIELD).dtype  # refuses those that are not read
        return
    checkpoint = Checkpoint.open(directory)
    for file in checkpoint.manifest.files:
        checkpoint.tensor_file(file)


def tokenizer_of(source: str, separator: str = "") -> Tokenizer:
    """The tokenizer that travels with the weights; `separator` is what data.separator says. Raises DataError."""
    companions = companions_of(source)
    if not any((companions / name).exists() for name in ("tokenizer.json", "shardwright-tokenizer.json")):
        raise DataError(f"{FIELD}: no tokenizer in {companions}", "put the model's tokenizer.json there")
    tokenizer = load_tokenizer(companions, separator=separator or None)
    if separator and getattr(tokenizer, "separator_token", None) != separator:
        raise DataError(
            f"data.separator: {separator!r} is given, but the tokenizer in {companions} has one of its own",
            "leave it out; it is for a tokenizer.json",
        )
    return tokenizer


def ends_of(source: str, tokenizer: Tokenizer, settings: Settings, context: int) -> Ends:
    """What ends a text: the separator, and what the model's own files name."""
    companions, tokens = companions_of(source), {tokenizer.separator}
    for name in (_GENERATION, CONFIG):
        if (companions / name).is_file():
            named = read_companion(companions / name).get("eos_token_id")
            tokens |= {token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)}
    return Ends(frozenset(tokens), tokenizer, settings, context)


def prompt_ids(
    tokenizer: Tokenizer, prompts: Sequence[str], vocab: int, context: int, origins: Sequence[str] = ()
) -> list[tuple[int, ...]]:
    """Ids of every prompt; `origins` say where each was given. Raises RunError for one that is no text or leaves no
    room in the context."""
    found = []
    for prompt, origin in zip(prompts, origins or numbered("prompt", len(prompts)), strict=True):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RunError(
                f"{origin} is not Unicode text: {prompt[error.start]!a} at character {error.start + 1}",
                "give text in UTF-8; half of a surrogate pair stands for nothing",
            ) from None
        ids = tokenizer.encode_prompt(prompt)
        if len(ids) >= context:
            raise RunError(
                f"{origin} has {len(ids)} tokens, and the model's context is {context}",
                f"give at most {context - 1}, so that there is room for one more",
            )
        if max(ids) >= vocab:
            raise RunError(
                f"{origin} has token {max(ids)}, and the model has {vocab} words",
                "the directory's tokenizer must be the model's",
            )
        found.append(tuple(ids))
    return found


def numbered(option: str, count: int) -> list[str]:
    """What prompts that were given one by one are called."""
    return [f"{option}: number {number}" for number in range(1, count + 1)]


def read_prompts(path: Path) -> dict[str, str]:
    """The prompts of a file with a line like {"prompt": "..."} for each, by where they are. Raises RunError."""
    way_out = 'write a line like {"prompt": "..."} for each'
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # a text may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RunError(f"--prompts: {path}: cannot be read: {reason}", way_out) from None
    prompts: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        origin = f"--prompts: {path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise RunError(f"{origin}: not JSON", way_out) from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise RunError(f"{origin}: has no text under prompt", way_out)
        prompts[origin] = row["prompt"]
    if not prompts:
        raise RunError(f"--prompts: {path}: has no prompt", way_out)
    return prompts
