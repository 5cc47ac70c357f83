"""The model cut into stages: consecutive blocks, and what travels between two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardwright.comm.line import Line
from shardwright.errors import LayoutError
from shardwright.parallel.data import Twin
from shardwright.parallel.tensor.region import Region
from shardwright.parallel.zero.membership import Shared


class Stage:
    """Consecutive blocks of a model: the first takes tokens, the last gives the loss, the others take what the block
    before gave."""

    def __init__(self, number: int, blocks: Sequence[nn.Module], *, is_first: bool, is_last: bool) -> None:
        self.number, self.blocks = number, blocks
        self.is_first, self.is_last = is_first, is_last

    def __call__(self, x: Tensor, targets: Tensor) -> Tensor:
        """The stage's output; of the last stage, the sum of the loss over the targets."""
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x, targets) if self.is_last else self.blocks[-1](x)


class WholeModel(Stage):
    """The one stage of a model that is not cut: its own forward, which need not be the chain of its blocks."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__(0, blocks, is_first=True, is_last=True)
        self.model = model

    def __call__(self, x: Tensor, targets: Tensor) -> Tensor:
        """The sum of the loss over the targets."""
        return self.model(x, targets)


@dataclass(frozen=True)
class Boundary:
    """What travels between stages: [positions, sequences, hidden] for a microbatch of tokens [sequences, positions].

    The positions are those that a rank of the `tp` axis has between matrix products.
    """

    region: Region
    hidden: int
    dtype: torch.dtype
    device: torch.device

    def shape(self, tokens: Tensor) -> tuple[int, int, int]:
        """Of one microbatch's activations."""
        sequences, positions = tokens.shape
        begin, end = self.region.local_positions(positions)
        return end - begin, sequences, self.hidden

    def empty(self, tokens: Tensor) -> Tensor:
        """Memory for one microbatch's activations, or for their gradient."""
        return torch.empty(self.shape(tokens), dtype=self.dtype, device=self.device)

    def check(self, output: Tensor, stage: Stage, tokens: Tensor) -> None:
        """Raises LayoutError where a stage gives what the next does not expect: bytes alone would not tell it."""
        expected = self.shape(tokens)
        if tuple(output.shape) != expected or output.dtype != self.dtype:
            raise LayoutError(
                f"parallel.pp: {type(stage.blocks[-1]).__name__}, the last block of stage {stage.number}, gives "
                f"{output.dtype} {list(output.shape)}, but {self.dtype} {list(expected)} goes from stage to stage",
                "blocks exchange [positions, sequences, model.hidden] in the dtype of the plan",
            )


_WHAT_BLOCKS_ARE = "blocks() is what comes before the layers, model.layers layers, and the head with the loss"


def layers_of(model: nn.Module, blocks: Sequence[nn.Module], count: int) -> Sequence[nn.Module]:
    """The blocks between the first and the last. Raises LayoutError where they are not as many as the plan's layers."""
    if len(blocks) != count + 2:
        raise LayoutError(
            f"memory.recompute: model.layers = {count}, but {type(model).__name__} has {len(blocks)} blocks",
            _WHAT_BLOCKS_ARE,
        )
    return blocks[1:-1]


def cut(model: nn.Module, blocks: Sequence[nn.Module], layers_per_stage: Sequence[int]) -> list[Stage]:
    """The model's stages: the first block goes with the first layers, the last block with the last.

    Raises LayoutError where the blocks are not as many as the layers ask for.
    """
    if len(layers_per_stage) == 1:
        return [WholeModel(model, blocks)]
    if len(blocks) != sum(layers_per_stage) + 2:
        raise LayoutError(
            f"parallel.pp: {len(layers_per_stage)} stages of {list(layers_per_stage)} layers, but "
            f"{type(model).__name__} has {len(blocks)} blocks",
            _WHAT_BLOCKS_ARE,
        )
    ends = [1 + sum(layers_per_stage[: stage + 1]) for stage in range(len(layers_per_stage))]
    ends[-1] = len(blocks)
    edges = list(zip([0, *ends], ends, strict=False))
    last = len(edges) - 1
    return [Stage(s, blocks[b:e], is_first=s == 0, is_last=s == last) for s, (b, e) in enumerate(edges)]


def shared_with(stages: Sequence[Stage], placement: Sequence[int], line: Line) -> dict[nn.Parameter, Shared]:
    """The parameters of this rank's stages that a stage of another rank uses too. The rank of the first user counts.

    Raises LayoutError where more than two ranks would have one.
    """
    found: dict[nn.Parameter, Shared] = {}
    for order, (parameter, ranks) in enumerate(_ranks_of_parameters(stages, placement).items()):
        if len(ranks) > 2:
            raise LayoutError(
                f"parallel.pp: a parameter is used by stages on {len(ranks)} ranks of the pipeline",
                "let at most two of them share it, or lower parallel.pp",
            )
        if len(ranks) == 2 and line.index in ranks:
            other = ranks[1 - ranks.index(line.index)]
            found[parameter] = Shared(Twin(line, other, order), counts=line.index == ranks[0])
    return found


def _ranks_of_parameters(stages: Sequence[Stage], placement: Sequence[int]) -> Mapping[nn.Parameter, list[int]]:
    """The ranks of the pipeline that use each parameter, in the order of the stages."""
    ranks: dict[nn.Parameter, list[int]] = {}
    for stage in stages:
        rank = placement[stage.number]
        for block in stage.blocks:
            for parameter in block.parameters():
                own = ranks.setdefault(parameter, [])
                if rank not in own:
                    own.append(rank)
    return ranks
