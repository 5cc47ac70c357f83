"""Spec -> Plan: every "auto" decided, every contradiction refused with the nearest way out."""

from __future__ import annotations

from shardwright.errors import LayoutError, RecipeError
from shardwright.plan.host import check_chunk, check_host
from shardwright.plan.plan import Device, Plan
from shardwright.plan.stages import resolve_stages
from shardwright.plan.world import crossings, resolve_topology
from shardwright.spec.architecture import Architecture, architecture_notes, nearest_divisors, resolve_architecture
from shardwright.spec.inherited import check_tokenizer, inherited_notes
from shardwright.spec.spec import Spec
from shardwright.spec.train import Dtype, TrainSpec


def resolve(
    spec: Spec,
    *,
    world_size: int | None,
    device: Device,
    native_bf16: bool,
    tokenizer_vocab: int | None,
    local_size: int | None = None,
) -> Plan:
    """The plan of a recipe on `world_size` ranks of `device`.

    `world_size` None takes dp x pp x tp from the recipe, with dp = 1 where it says "auto". `tokenizer_vocab` is the
    default of `model.vocab`. `local_size` is the number of ranks of a node; given, groups that cross nodes are warned
    about. Raises RecipeError or LayoutError.
    """
    train = spec.train
    architecture = resolve_architecture(
        spec.model,
        sequence_length=train.sequence_length,
        tokenizer_vocab=tokenizer_vocab,
        expected_vocab=spec.data.expected_vocab,
    )
    architecture.check_sequence_length(train.sequence_length)
    check_tokenizer(spec)
    _check_device(spec, device)
    _check_tensor_parallel(architecture, spec.parallel.tp)
    _check_recompute(architecture, spec)
    topology, decisions = resolve_topology(spec, world_size)
    num_microbatches = _num_microbatches(train, topology.dp)
    stages = resolve_stages(architecture, spec, topology, world_size)
    dtype, grad_dtype, notes, warnings = _dtypes(train, device, native_bf16)
    notes += _backend_notes(spec, device)
    if spec.run.device == "auto":
        notes.insert(0, f"run.device = {device}: what this machine has")
    if spec.model.vocab is None and architecture.vocab == (tokenizer_vocab or spec.data.expected_vocab):
        notes.append(f"model.vocab = {architecture.vocab}: the tokenizer's")
    plan = Plan(
        spec=spec,
        architecture=architecture,
        topology=topology,
        world_size=topology.world_size,
        device=device,
        dtype=dtype,
        grad_dtype=grad_dtype,
        sequence_length=train.sequence_length,
        num_microbatches=num_microbatches,
        layers_per_stage=stages.layers_per_stage,
        decisions=(*decisions, *notes, *stages.decisions),
        warnings=(
            *warnings,
            *_schedule_warnings(train),
            *stages.warnings,
            *architecture_notes(spec.model),
            *inherited_notes(spec.model, architecture),
            *(crossings(topology, local_size, spec.parallel.zero) if local_size else ()),
        ),
    )
    check_chunk(plan)
    check_host(plan, local_size or plan.world_size)
    return plan


def _check_device(spec: Spec, device: Device) -> None:
    if spec.run.device not in ("auto", device):
        raise RecipeError(
            f"run.device: {spec.run.device} was asked for, and the ranks run on {device}",
            f'what works: run.device = "auto" or "{device}"',
        )
    if spec.run.backend == "nccl" and device == "cpu":
        raise RecipeError(
            "run.backend: nccl moves the memory of GPUs, and the ranks run on cpu",
            'what works: run.backend = "auto" or "gloo", or run.device = "cuda"',
        )


def _backend_notes(spec: Spec, device: Device) -> list[str]:
    """What a backend that was asked for means for the ranks."""
    if spec.run.backend != "gloo" or device != "cuda":
        return []
    return ["run.backend = gloo: ranks share GPUs where they are more than these, and exchange through host memory"]


def _schedule_warnings(train: TrainSpec) -> tuple[str, ...]:
    """A short run may end inside its warmup: odd, and fine for a first try."""
    decay = round(train.decay_fraction * train.steps) if train.lr_schedule == "wsd" else 0
    if train.warmup_steps + decay <= train.steps:
        return ()
    beside = f" beside {decay} steps of decay" if decay else ""
    return (f"train.warmup_steps = {train.warmup_steps} do not fit into train.steps = {train.steps}{beside}",)


def _check_tensor_parallel(architecture: Architecture, tp: int) -> None:
    """Heads divide by tp; the feed-forward and the vocabulary are cut into parts of any size, but none empty."""
    heads = architecture.heads
    if heads % tp:
        raise LayoutError(
            f"parallel.tp: {tp} does not divide model.heads = {heads}",
            f"nearest that works: tp = {nearest_divisors(heads, tp)}",
        )
    most = min(architecture.ffn, architecture.vocab)
    for field, size in (("ffn", architecture.ffn), ("vocab", architecture.vocab)):
        if tp > size:
            works = max(degree for degree in range(1, most + 1) if heads % degree == 0)
            raise LayoutError(
                f"parallel.tp: {tp} is more than model.{field} = {size}, of which each rank has a part",
                f"nearest that works: tp = {works}",
            )


def _check_recompute(architecture: Architecture, spec: Spec) -> None:
    chosen = spec.memory.recompute_layers
    if isinstance(chosen, str):
        return
    if wrong := [index for index in chosen if index >= architecture.layers]:
        raise RecipeError(
            f"memory.recompute_layers: there is no layer {wrong[0]} among model.layers = {architecture.layers}",
            f"layers are counted from 0 to {architecture.layers - 1}",
        )
    if spec.memory.recompute == "none" and chosen:
        raise RecipeError(
            'memory.recompute_layers: names layers, and memory.recompute is "none"',
            'what works: memory.recompute = "selective" or "full", or no recompute_layers',
        )
    if len(set(chosen)) != len(chosen):
        raise RecipeError(f"memory.recompute_layers: {list(chosen)} names a layer twice", "name each once")


def _num_microbatches(train: TrainSpec, dp: int) -> int:
    """Microbatches that one data rank sees in a step."""
    batch, micro = train.global_batch_size, train.micro_batch_size
    if batch % (dp * micro) == 0:
        return batch // (dp * micro)
    below = batch // (dp * micro) * dp * micro
    ways = ["train.global_batch_size = " + " or ".join(str(size) for size in (below, below + dp * micro) if size)]
    if batch % micro == 0 and (others := nearest_divisors(batch // micro, dp)):
        ways.append(f"parallel.dp = {others}")
    raise LayoutError(
        f"train.global_batch_size: {batch} is not divisible by dp x train.micro_batch_size = {dp} x {micro}",
        f"nearest that works: {', or '.join(ways)}",
    )


def _dtypes(train: TrainSpec, device: Device, native_bf16: bool) -> tuple[Dtype, Dtype, list[str], list[str]]:
    """The dtype of compute and of gradients; what was decided; what to warn about."""
    decisions: list[str] = []
    warnings: list[str] = []
    dtype: Dtype = train.dtype if train.dtype != "auto" else "bf16" if native_bf16 else "fp32"
    if train.dtype == "auto":
        computes = "computes" if native_bf16 else "does not compute"
        decisions.append(f"train.dtype = {dtype}: this {device} {computes} bf16 natively")
    elif dtype == "bf16" and not native_bf16:
        warnings.append(f"train.dtype = bf16: this {device} does not compute bf16 natively; fp32 may be faster")
    grad_dtype = _grad_dtype(train, dtype)
    if grad_dtype != train.grad_dtype:
        decisions.append(f"train.grad_dtype = {grad_dtype}: gradients are no narrower than {dtype} compute")
    return dtype, grad_dtype, decisions, warnings


def _grad_dtype(train: TrainSpec, dtype: Dtype) -> Dtype:
    """Gradients are at least as wide as compute, and fp64 only with fp64."""
    asked = train.grad_dtype
    if asked == "fp64" and dtype != "fp64":
        raise RecipeError(
            f"train.grad_dtype: fp64 goes with train.dtype = fp64, not with {dtype}",
            'nearest that works: grad_dtype = "fp32"',
        )
    if dtype == "fp64" and asked == "fp32":
        return "fp64"  # the default, so that train.dtype=fp64 alone asks for all of it
    if asked == "bf16" and dtype != "bf16":
        if train.dtype == "auto":
            return dtype  # the recipe was written for a machine with bf16
        raise RecipeError(
            f"train.grad_dtype: bf16 is narrower than train.dtype = {dtype}",
            f'nearest that works: grad_dtype = "{dtype}"',
        )
    return asked
