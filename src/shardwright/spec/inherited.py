"""A model beside the one whose weights it takes: what must be the same, and what is told where it is not."""

from __future__ import annotations

from typing import Any

from shardwright.errors import RecipeError
from shardwright.spec.architecture import Architecture, architecture_defaults
from shardwright.spec.hf_config import read_config
from shardwright.spec.model import ModelSpec
from shardwright.spec.origin import COMPANIONS, FIELD, Origin, inherited_fields, origin_of
from shardwright.spec.problems import show
from shardwright.spec.spec import Spec

_FREE = ("init_std",)  # says how weights start, and these have started
_TUNABLE = ("norm_eps", "rope_theta", "rope_scaling")  # the same weights compute a little differently


def inherited_notes(model: ModelSpec, architecture: Architecture) -> tuple[str, ...]:
    """What is left aside of the model that `init_from` names, and where the recipe's computes differently.

    Raises RecipeError where its weights would not fit.
    """
    if not model.init_from:
        return ()
    origin, directory = origin_of(model.init_from)
    notes = read_config(directory, FIELD).notes if origin is Origin.HUGGING_FACE else ()
    inherited = inherited_fields(model, None)
    whole = architecture_defaults(inherited, architecture.max_positions) | inherited
    return (*notes, *differences(whole, architecture, FIELD))


def check_tokenizer(spec: Spec) -> None:
    """Raises RecipeError where weights that come with a tokenizer would be trained on the ids of another by default."""
    if not spec.model.init_from or spec.data.corpus == "random" or spec.data.expected_vocab is None:
        return
    origin, directory = origin_of(spec.model.init_from)
    brings = directory / COMPANIONS if origin is Origin.CHECKPOINT else directory
    if (brings / "tokenizer.json").exists():
        raise RecipeError(
            f"data.tokenizer: {show(spec.data.tokenizer)}, and {FIELD} brings a tokenizer of its own",
            f'what works: data.tokenizer = "{brings}"',
        )


def differences(saved: dict[str, Any], architecture: Architecture, of: str) -> tuple[str, ...]:
    """Fields in which a model computes otherwise than the one that was saved. `of` says whose weights those are.

    Raises RecipeError for a field that makes it another model.
    """
    found = []
    for name, own in architecture.model_dump(mode="json").items():
        value = saved.get(name, own)
        free = name in _FREE or (name == "max_positions" and architecture.positions == "rotary")
        if own == value or free:
            continue
        if name not in _TUNABLE:
            raise RecipeError(
                f"model.{name}: {show(own)}, and {show(value)} in {of}",
                f"what works: model.{name} = {show(value)}, or a new model without those weights",
            )
        found.append(f"model.{name} = {show(own)}, and {show(value)} in {of}")
    return tuple(found)
