"""The seed's techniques as changes of a recipe: what each asks of so many ranks, or why it cannot be had on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shardwright.errors import LayoutError
from shardwright.plan.fit import with_fields
from shardwright.spec.spec import Spec

Fields = dict[str, str | int]

_PLAIN: Fields = {
    "parallel.dp": 1,
    "parallel.tp": 1,
    "parallel.pp": 1,
    "parallel.zero": 0,
    "parallel.dp_shard": "auto",
    "parallel.zero_pipeline": "save_memory",
    "parallel.pipeline_schedule": "1f1b",
    "parallel.virtual_stages": 1,
    "parallel.stages": "auto",
    "parallel.sequence_parallel": True,
    "memory.offload": "none",
}


@dataclass(frozen=True)
class Technique:
    """`fields` gives, for a number of ranks, the fields of the recipe that make the technique of all of them. `modules`
    are the files of the package, or their folders, that are there for it alone. `single` is one rank, whatever the
    world. `axis` is the one that takes all ranks, where one alone does."""

    name: str
    fields: Callable[[int], Fields]
    modules: tuple[str, ...] = ()
    single: bool = False
    axis: str = ""

    @property
    def slug(self) -> str:
        """The name as a file has it."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.name.lower()).split())

    def applied(self, spec: Spec, world: int) -> Spec:
        """The recipe with the technique on `world` ranks. Raises LayoutError where these are too few for it."""
        return with_fields(spec, _PLAIN | self.fields(1 if self.single else world))


def _data(world: int) -> Fields:
    return {"parallel.dp": world}


def _tensor(world: int) -> Fields:
    return {"parallel.tp": world}


def _pipeline(schedule: str, virtual_stages: int = 1) -> Callable[[int], Fields]:
    return lambda world: {
        "parallel.pp": world,
        "parallel.pipeline_schedule": schedule,
        "parallel.virtual_stages": virtual_stages,
    }


def _zero(stage: int, offload: str = "none") -> Callable[[int], Fields]:
    return lambda world: {"parallel.dp": world, "parallel.zero": stage, "memory.offload": offload}


def _three(world: int) -> Fields:
    """tp and pp alike, as near to the cube root as a power of two comes, and dp for the rest."""
    degree = 2
    while (2 * degree) ** 3 <= world and world % (2 * degree) ** 2 == 0:
        degree *= 2
    if world < 8 or world % degree**2:
        raise LayoutError(
            f"--world: {world} ranks cannot be cut into dp x tp x pp of at least 2 each", "what works: 8, 12, 16 or 64"
        )
    return {"parallel.tp": degree, "parallel.pp": degree, "parallel.dp": world // degree**2}


_TENSOR = ("parallel/tensor",)
_PIPELINE = ("parallel/pipeline.py", "parallel/stage.py", "schedule", "plan/balance.py", "comm/line.py")
_ZERO = ("parallel/zero", "layout/flat.py")
_DATA = ("parallel/data.py",)

TECHNIQUES = (
    Technique("one device", lambda _: {}, single=True),
    Technique("data parallelism", _data, _DATA),
    Technique("tensor parallelism", _tensor, _TENSOR, axis="tp"),
    Technique(
        "tensor parallelism, all-reduce form",
        lambda world: _tensor(world) | {"parallel.sequence_parallel": False},
        _TENSOR,
        axis="tp",
    ),
    Technique("pipeline, gpipe", _pipeline("gpipe"), _PIPELINE, axis="pp"),
    Technique("pipeline, 1f1b", _pipeline("1f1b"), _PIPELINE, axis="pp"),
    Technique("pipeline, interleaved", _pipeline("interleaved", 2), _PIPELINE, axis="pp"),
    Technique("pipeline, zb-h1", _pipeline("zb-h1"), _PIPELINE, axis="pp"),
    Technique("pipeline, zbv", _pipeline("zbv", 2), _PIPELINE, axis="pp"),
    Technique("3D", _three, (*_DATA, *_TENSOR, *_PIPELINE)),
    Technique("ZeRO-1", _zero(1), _ZERO),
    Technique("ZeRO-2", _zero(2), _ZERO),
    Technique("ZeRO-3", _zero(3), _ZERO),
    Technique("ZeRO-Offload, state", _zero(1, "state"), (*_ZERO, "parallel/offload")),
    Technique("ZeRO-Offload, update", _zero(1, "update"), (*_ZERO, "parallel/offload")),
)


def chosen(only: Iterable[str]) -> tuple[Technique, ...]:
    """Those whose name or slug begins with one of `only`; all where it is empty. Raises LayoutError."""
    wanted = [text.lower() for text in only]
    for text in wanted:
        if not any(_begins(technique, text) for technique in TECHNIQUES):
            names = ", ".join(technique.slug for technique in TECHNIQUES)
            raise LayoutError(f'--only: no technique is named "{text}"', f"one of: {names}")
    return tuple(t for t in TECHNIQUES if not wanted or any(_begins(t, text) for text in wanted))


def _begins(technique: Technique, text: str) -> bool:
    return bool(text) and (technique.name.lower().startswith(text) or technique.slug.startswith(text))
