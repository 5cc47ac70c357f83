"""Layouts across a slow link: the rank's part and the report of `benchmarks/two_nodes.sh`, which builds the nodes.

    benchmarks/two_nodes.sh [--rate MBIT] [--rounds N] [--steps N] [--only CASE ...] [--record]

Two network namespaces of this machine are nodes; a pair of virtual interfaces between them, shaped to a rate in each
direction, is the link. torchrun starts half of the ranks in each node. Every case is the same model on the same global
batches; cases take turns, so that they drift together. A turn's first step is not timed: it begins without transfers
under way, and each later step also ends what the one before has left.

What crossed the link is read from the interface's own counters, over whole turns. What was expected is worked out from
the plan's estimate of what each rank sends and from how each verb sends it; see `expected`. The exit code is 1 where a
ledger is not its plan's estimate, where cases disagree about the first loss, or where the counters are not within
BAR of what was expected.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.harness import RECORDS, Result, against, environment, quartiles
from shardwright.comm.collectives import barrier
from shardwright.comm.job import Job
from shardwright.comm.launch import run
from shardwright.comm.worker import Worker
from shardwright.cost.communication import axis_name
from shardwright.data.samples import RandomSamples
from shardwright.layout.mesh import AXES, DATA_AXES
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.parallel.zero.residency import Residency
from shardwright.plan.communication import estimated_communication, total_sent
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build
from shardwright.train.batches import rank_batch
from shardwright.train.step import train_step
from shardwright.units import Seconds

MODEL = {"layers": 4, "hidden": 192, "heads": 4, "ffn": 384, "vocab": 512}
SEQUENCES, LENGTH = 16, 96
NODES = 2
BAR = 0.1  # headers and acknowledgements are 1 to 5 % more than was sent; small messages cost a little beside
SLACK = 200_000  # bytes a step: what ranks and torchrun's agents tell each other beside a step
INTERFACES = Path("/sys/class/net")


@dataclass(frozen=True)
class Case:
    """A layout on two nodes. `crossing` names what is sent over the link; `parallel` is the recipe's table."""

    section: str
    name: str
    crossing: str
    micro_batch_size: int
    parallel: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Section and name: unlike any other case's."""
        return f"{self.section}: {self.name}"

    @property
    def plan(self) -> Plan:
        """The resolved plan, the same on every rank."""
        train = {
            "dtype": "fp32",
            "sequence_length": LENGTH,
            "global_batch_size": SEQUENCES,
            "micro_batch_size": self.micro_batch_size,
        }
        tables = {"model": MODEL, "data": {"corpus": "random"}, "train": train, "parallel": self.parallel}
        return resolve(build(tables), world_size=None, device="cpu", native_bf16=False, tokenizer_vocab=None)


def _zero(section: str, micro_batch_size: int) -> list[Case]:
    """The ZeRO stages on four data ranks, sharded over both nodes and inside one."""
    sent = ("gradients", "gradients, parameters", "gradients, parameters", "parameters, gradients")
    found = []
    for zero in (0, 1, 2, 3):
        name = "zero 0" if zero == 0 else f"zero {zero}, dp_shard 4"
        found.append(Case(section, name, sent[zero], micro_batch_size, {"dp": 4, "zero": zero}))
    for zero in (1, 2, 3):
        table = {"dp": 4, "zero": zero, "dp_shard": 2}
        found.append(Case(section, f"zero {zero}, dp_shard 2", "shares of gradients", micro_batch_size, table))
    return found


def _two_orders(
    section: str, crossing: str, micro_batch_size: int, parallel: dict[str, Any], order: str, other: str
) -> list[Case]:
    """A layout in the default order, and in another, in which `other` is what crosses."""
    return [
        Case(section, "the default order", crossing, micro_batch_size, parallel),
        Case(section, f"order {order}", other, micro_batch_size, parallel | {"order": order}),
    ]


ONE, FOUR, CUBE = "dp 4, one microbatch", "dp 4, four microbatches", "dp 2 x pp 2 x tp 2"
REVERSED = "tp,shard,pp,replicate"
CASES = (
    *_zero(ONE, 4),
    Case(
        ONE,
        "zero 3, dp_shard 2, order shard,pp,replicate,tp",
        "parameters, gradients",
        4,
        {"dp": 4, "zero": 3, "dp_shard": 2, "order": "shard,pp,replicate,tp"},
    ),
    *_zero(FOUR, 1),
    Case(
        FOUR,
        "zero 3, dp_shard 4, save_communication",
        "parameters, gradients",
        1,
        {"dp": 4, "zero": 3, "zero_pipeline": "save_communication"},
    ),
    *_two_orders("dp 2 x tp 2", "gradients, parameters", 8, {"dp": 2, "tp": 2}, REVERSED, "activations of tp"),
    *_two_orders("pp 2 x tp 2", "the pipeline", 2, {"dp": 1, "pp": 2, "tp": 2}, REVERSED, "activations of tp"),
    *_two_orders(
        "dp 2 x pp 2", "the pipeline", 2, {"dp": 2, "pp": 2}, "replicate,shard,pp,tp", "gradients, parameters"
    ),
    Case(CUBE, "dp_shard 2", "the pipeline", 2, {"dp": 2, "pp": 2, "tp": 2}),
    Case(CUBE, "dp_shard 1", "gradients", 2, {"dp": 2, "pp": 2, "tp": 2, "dp_shard": 1}),
    Case(
        CUBE,
        f"dp_shard 2, order {REVERSED}",
        "activations of tp",
        2,
        {"dp": 2, "pp": 2, "tp": 2, "order": REVERSED},
    ),
)


def chosen(world: int, only: Sequence[str]) -> list[Case]:
    """The cases of so many ranks whose titles hold one of `only`, if there are any."""
    fitting = [case for case in CASES if case.plan.world_size == world]
    return [case for case in fitting if not only or any(part in case.title for part in only)]


def worlds_of(only: Sequence[str]) -> list[int]:
    """How many ranks the chosen cases have."""
    return [world for world in (4, 8) if chosen(world, only)]


# What should cross


def expected(plan: Plan) -> int:
    """Bytes that should cross the link in a step, both directions together, without headers.

    Over gloo a sum of more than two ranks goes around a ring: all that a rank sends, it sends to the next. Every other
    verb sends as much to each of the other ranks of its axis; see "direct exchange" in comm/collectives.py.
    """
    per_node, topology = plan.world_size // NODES, plan.topology
    named = {axis_name(axes): axes for axes in (*((axis,) for axis in AXES), DATA_AXES, AXES)}
    total = 0.0
    for rank in range(plan.world_size):
        for row in estimated_communication(plan, rank):
            members = topology.group(named[row.axis], rank)
            here = members.index(rank)
            others = [*members[here + 1 :], *members[:here]]
            if row.verb == "all_reduce":
                others = others[:1]
            foreign = sum(other // per_node != rank // per_node for other in others)
            total += row.sent * foreign / len(others)
    return round(total)


# On a rank


@dataclass(frozen=True)
class Counters:
    """Bytes that this node's interfaces have carried: out of the link's end and into it, and over the loopback."""

    out: int
    into: int
    inside: int

    @staticmethod
    def read() -> Counters:
        """What they say now."""
        link, loopback = INTERFACES / os.environ["GLOO_SOCKET_IFNAME"], INTERFACES / "lo"
        paths = (link / "statistics/tx_bytes", link / "statistics/rx_bytes", loopback / "statistics/tx_bytes")
        return Counters(*(int(path.read_text()) for path in paths))

    def since(self, before: Counters, steps: int) -> dict[str, float]:
        """Bytes a step."""
        return {name: (value - getattr(before, name)) / steps for name, value in asdict(self).items()}


class Contender:
    """A case's training on one rank."""

    def __init__(self, case: Case, worker: Worker) -> None:
        self.title, plan = case.title, case.plan
        self.runtime = compose(plan, worker.mesh(plan.topology))
        self.optimizer = make_optimizer(plan.spec.train, self.runtime.states.owned_tensors())
        self.samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 0)
        self.step = 0
        self.turns: list[dict[str, Any]] = []
        self.first_loss = self._step()
        self._end()

    def _step(self) -> float:
        batch = rank_batch(self.runtime, self.samples, self.step)
        self.step += 1
        return train_step(self.runtime, self.optimizer, batch, 1e-4).loss

    def _end(self) -> None:
        """Nothing of this case is under way on any rank."""
        self.runtime.states.finish()
        for unit in self.runtime.states.units:
            if unit.residency is Residency.GATHERING:
                unit.need()
        barrier(self.runtime.mesh.world)

    def turn(self, steps: int) -> None:
        """One step that begins alone, and then so many that are timed."""
        ledger = self.runtime.mesh.ledger
        ledger.clear()
        barrier(self.runtime.mesh.world)
        before = Counters.read()
        self._step()
        clock = [time.perf_counter()]
        for _ in range(steps):
            self._step()
            clock.append(time.perf_counter())
        self._end()
        bytes_a_step = Counters.read().since(before, steps + 1)
        sent = sum(row.sent for row in ledger.rows.values()) / (steps + 1)
        seconds = [end - begin for begin, end in pairwise(clock)]
        self.turns.append({"seconds": seconds, "ledger": sent, **bytes_a_step})


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    """A rank: all cases of its world in turns. They have warmed up with their first steps."""
    folder, rounds, steps, *only = arguments
    contenders = [Contender(case, worker) for case in chosen(worker.world_size, only)]
    for index in range(int(rounds)):
        began = time.perf_counter()
        for contender in reversed(contenders) if index % 2 else contenders:
            contender.turn(int(steps))
        if worker.rank == 0:
            took = time.perf_counter() - began
            print(
                f"{worker.world_size} ranks, round {index + 1} of {rounds}: {took:.0f} s", file=sys.stderr, flush=True
            )
    content = {each.title: {"first_loss": each.first_loss, "turns": each.turns} for each in contenders}
    (Path(folder) / f"{worker.world_size}-{worker.rank}.json").write_text(json.dumps(content))


# The report


@dataclass(frozen=True)
class Row:
    """What was measured of a case: seconds by round, bytes a step by round, the ledger and the estimate by rank."""

    section: str
    name: str
    crossing: str
    world: int
    first_loss: float
    seconds: list[float]  # of each round the median
    out: list[float]  # of the first node
    into: list[float]
    inside: list[float]  # of both nodes
    expected: int
    ledger: list[float]
    estimate: list[int]

    @property
    def crossed(self) -> float:
        """Bytes over the link a step, both directions, the median over rounds."""
        return statistics.median(out + into for out, into in zip(self.out, self.into, strict=True))

    @property
    def stayed(self) -> float:
        """Bytes over the nodes' loopbacks a step, the median over rounds."""
        return statistics.median(self.inside)

    @property
    def busier(self) -> float:
        """Bytes a step of the direction that carries more."""
        return max(statistics.median(self.out), statistics.median(self.into))

    @property
    def result(self) -> Result:
        """As the harness compares them."""
        return Result(self.name, "", (), "", [], self.seconds)


def rows_of(folder: Path, only: Sequence[str]) -> list[Row]:
    """What the ranks wrote, case by case."""
    rows = []
    for world in worlds_of(only):
        ranks = [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]
        for case in chosen(world, only):
            plan, found = case.plan, [rank[case.title] for rank in ranks]
            first, second = found[0]["turns"], found[world // NODES]["turns"]
            rows.append(
                Row(
                    section=case.section,
                    name=case.name,
                    crossing=case.crossing,
                    world=world,
                    first_loss=found[0]["first_loss"],
                    seconds=[statistics.median(turn["seconds"]) for turn in first],
                    out=[turn["out"] for turn in first],
                    into=[turn["into"] for turn in first],
                    inside=[a["inside"] + b["inside"] for a, b in zip(first, second, strict=True)],
                    expected=expected(plan),
                    ledger=[statistics.mean(turn["ledger"] for turn in rank["turns"]) for rank in found],
                    estimate=[total_sent(estimated_communication(plan, rank)) for rank in range(world)],
                )
            )
    return rows


def wrong(rows: Sequence[Row]) -> list[str]:
    """What does not hold, in words."""
    losses = [row.first_loss for row in rows]
    found = [f"first losses differ: {losses}"] if max(losses) - min(losses) > 1e-5 * min(losses) else []
    for row in rows:
        if row.ledger != row.estimate:
            found.append(f"{row.section}, {row.name}: the ledger has {row.ledger}, the plan {row.estimate}")
        inside = sum(row.estimate) - row.expected
        for verb, measured, due in (("crossed", row.crossed, row.expected), ("stayed inside", row.stayed, inside)):
            if not -0.01 * due < measured - due < BAR * due + SLACK:
                found.append(f"{row.section}, {row.name}: {measured:,.0f} bytes {verb}, {due:,} were expected")
    return found


def table(rows: Sequence[Row], rate: float) -> str:
    """A Markdown table; `rate` is the link's in bits a second, each direction."""
    heads = ["case", "crosses the link", "ms a step (quartiles)", "tokens/s", "x the section's fastest"]
    heads += ["over the link, MB a step", "expected", "the link alone, ms", "inside nodes, MB", "sent by a rank, MB"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        peers = [other for other in rows if other.section == row.section]
        fastest = min(peers, key=lambda other: statistics.median(other.seconds))
        low, middle, high = quartiles(row.seconds)
        slower = against(fastest.result, row.result)[1]
        sent = sorted({round(size / 1e6, 2) for size in row.estimate})
        cells = [
            f"**{row.section}, {row.world} ranks:** {row.name}" if row is peers[0] else row.name,
            row.crossing,
            f"{middle * 1e3:.0f} ({low * 1e3:.0f} to {high * 1e3:.0f})",
            f"{SEQUENCES * LENGTH / middle:,.0f}",
            f"{slower:.2f}",
            f"{row.crossed / 1e6:.2f}",
            f"{row.expected / 1e6:.2f}",
            f"{row.busier * 8 / rate * 1e3:.0f}",
            f"{row.stayed / 1e6:.2f}",
            " to ".join(f"{size:.2f}" for size in sorted({sent[0], sent[-1]})),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def told(rows: Sequence[Row], rate: float, rounds: int, steps: int) -> str:
    """The record for people."""
    parameters = CASES[0].plan.architecture.num_parameters
    beyond = [row.crossed / row.expected - 1 for row in rows]
    drift = [(q[2] - q[0]) / q[1] for q in (quartiles(row.seconds) for row in rows)]
    return "\n".join(
        [
            f"{parameters / 1e6:.2f} M parameters (Φ = {parameters * 4 / 1e6:.2f} MB in fp32), {SEQUENCES} sequences "
            f"of {LENGTH} tokens a step, AdamW; two nodes and {rate / 1e6:.0f} Mbit/s each way between them; medians "
            f"of {rounds} rounds of {steps} steps.",
            "",
            table(rows, rate),
            "",
            "Over the link: both directions; the link alone: what the busier of them takes. The counters are "
            f"{min(beyond):+.1%} to {max(beyond):+.1%} off what was expected: headers and acknowledgements. Sent by a "
            "rank: the ledger, on every rank equal to the plan's estimate. From quartile to quartile step times vary "
            f"by {statistics.median(drift):.0%} of their median in the middle case and {max(drift):.0%} in the worst.",
        ]
    )


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("part", choices=["setting", "rank", "report"], help="what the script asks for")
    parser.add_argument("--folder", help="where ranks write")
    parser.add_argument("--rate", type=int, default=100, help="of the link, Mbit/s in each direction")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1, help="timed in each round")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="cases whose titles hold one of these")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDS}/two_nodes.*")
    asked = parser.parse_args()
    if not worlds_of(asked.only):
        parser.error(f"--only: no case's title holds any of {asked.only}; there are: {[case.title for case in CASES]}")
    return asked


def _report(asked: argparse.Namespace) -> int:
    rows, rate = rows_of(Path(asked.folder), asked.only), asked.rate * 1e6
    text = told(rows, rate, asked.rounds, asked.steps)
    print(text)
    if asked.record:
        options = f" --rate {asked.rate} --rounds {asked.rounds} --steps {asked.steps}"
        options += " --only " + " ".join(f'"{part}"' for part in asked.only) if asked.only else ""
        command, where = f"benchmarks/two_nodes.sh{options}", environment(max(row.world for row in rows))
        content = {"command": command, "date": time.strftime("%Y-%m-%d"), "environment": where, "rate": rate}
        content |= {"tokens_per_step": SEQUENCES * LENGTH, "results": [asdict(row) for row in rows]}
        (RECORDS / "two_nodes.json").write_text(json.dumps(content, indent=1) + "\n")
        machine = f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}"
        (RECORDS / "two_nodes.md").write_text(f"`{command}`, {machine}\n\n{text}\n")
    failures = wrong(rows)
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    asked = _parsed()
    if asked.part == "setting":
        print(asked.rate, *worlds_of(asked.only))
    elif asked.part == "rank":
        passed = (asked.folder, str(asked.rounds), str(asked.steps), *asked.only)
        sys.exit(run(Job(0, "benchmarks.two_nodes", passed, grace_period=Seconds(1))))
    else:
        sys.exit(_report(asked))
