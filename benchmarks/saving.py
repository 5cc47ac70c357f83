"""What saving costs: a 100 M-parameter run that saves once a minute, beside one that does not.

    python -m benchmarks.saving [--minutes 6] [--record]

Two ranks, fp32, ZeRO-1, AdamW: 12 bytes a parameter are saved. One run trains throughout; its time is cut in segments
of a minute, of which every other one begins with a save, so that both kinds see the same machine. A segment's time per
step is compared with the mean of its neighbours. The loop's standstill is the Saver's own `stall`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import RECORDS, environment
from shardwright.checkpoint.folder import CheckpointFolder
from shardwright.checkpoint.manifest import Training
from shardwright.checkpoint.save import Saver
from shardwright.comm.collectives import broadcast_text
from shardwright.comm.job import Job
from shardwright.comm.launch import launch
from shardwright.comm.mesh import Mesh
from shardwright.comm.worker import Worker
from shardwright.data.samples import RandomSamples
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.record.records import SaveRecord
from shardwright.spec.load import build
from shardwright.train.batches import rank_batch
from shardwright.train.step import train_step

WORLD = 2
MODEL = {"layers": 12, "hidden": 768, "heads": 12, "ffn": 2048, "vocab": 16384, "tied_embeddings": True}
BAR_LONGER, BAR_STALL = 0.05, 0.5


def plan_of() -> Plan:
    """The 98 M-parameter model on two ranks."""
    train = {"dtype": "fp32", "sequence_length": 256, "global_batch_size": 2, "micro_batch_size": 1}
    tables = {"model": MODEL, "train": train, "parallel": {"zero": 1}}
    return resolve(build(tables), world_size=WORLD, device="cpu", native_bf16=True, tokenizer_vocab=None)


class Run:
    """The run on one rank: segments of so many steps, with or without a save at their beginning."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.plan = plan_of()
        self.mesh = Mesh(self.plan.topology, worker.device)
        self.runtime = compose(self.plan, self.mesh)
        self.optimizer = make_optimizer(self.plan.spec.train, self.runtime.states.owned_tensors())
        self.samples = RandomSamples(self.plan.architecture.vocab, self.plan.sequence_length, 0)
        self.saves: list[SaveRecord] = []
        began = time.perf_counter()
        checkpoints = CheckpointFolder(folder / "checkpoints")
        self.saver = Saver(checkpoints, self.runtime, self.optimizer, folder / "model", tell=self.saves.append)
        self.made_in = time.perf_counter() - began
        self.step = 0

    def segment(self, steps: int, save: bool) -> tuple[float, float]:
        """Seconds of a segment, and seconds of this process' threads on a core."""
        began, busy = time.perf_counter(), time.process_time()
        if save:
            self.saver.save(self._training())
        for _ in range(steps):
            batch = rank_batch(self.runtime, self.samples, self.step)
            result = train_step(self.runtime, self.optimizer, batch, 1e-4, votes=self.saver.votes())
            self.saver.heard(*result.votes)
            self.step += 1
        return time.perf_counter() - began, time.process_time() - busy

    def _training(self) -> Training:
        return Training(
            step=self.step,
            position=self.step * self.plan.spec.train.global_batch_size,
            updates=self.step,
            optimizer="adamw",
            seed=0,
            data="random",
            world_size=WORLD,
        )


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    """A rank: segments in turns, without and with a save, and at the end one without."""
    folder, minutes = Path(arguments[0]), int(arguments[1])
    run = Run(worker, folder)
    run.segment(2, save=False)  # warms up
    steps = max(1, round(60 / (run.segment(4, save=False)[0] / 4)))
    steps = int(broadcast_text(str(steps), run.mesh.world, worker.device))  # every rank has a clock of its own
    rows = []
    for number in range(minutes + 1):
        save = number % 2 == 1
        seconds, processor = run.segment(steps, save)
        rows.append({"saves": save, "seconds": seconds, "processor": processor})
        if worker.rank == 0:
            print(f"segment {number}: {rows[-1]['seconds']:.1f} s{' with a save' if save else ''}", file=sys.stderr)
    run.saver.drain()
    content = {
        "steps_per_segment": steps,
        "segments": rows,
        "saves": [record.as_json() for record in run.saves],
        "buffers_made_in": run.made_in,
        "parameters": run.plan.architecture.num_parameters,
    }
    (folder / f"{worker.rank}.json").write_text(json.dumps(content))


def measured(minutes: int) -> list[dict[str, Any]]:
    """What each rank measured."""
    with tempfile.TemporaryDirectory(prefix="shardwright-saving-") as folder:
        if code := launch(Job(WORLD, "benchmarks.saving", (folder, str(minutes)))):
            raise SystemExit(code)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(WORLD)]


def summary(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """How much longer segments with a save took than their neighbours, and the longest standstill of any rank."""
    longer = _beside_neighbours(ranks[0]["segments"], "seconds")
    busier = _beside_neighbours(ranks[0]["segments"], "processor")
    stalls = [save["stall"] for rank in ranks for save in rank["saves"]]
    return {
        "longer_median": statistics.median(longer),
        "longer": longer,
        "busier_median": statistics.median(busier),
        "busier": busier,
        "stall_most": max(stalls),
        "stall_median": statistics.median(stalls),
        "complete_after": [save["seconds"] for save in ranks[0]["saves"]],
        "bytes": ranks[0]["saves"][0]["bytes"],
    }


def _beside_neighbours(rows: list[dict[str, Any]], clock: str) -> list[float]:
    """By how much each segment with a save is longer than the mean of those around it."""
    values = [row[clock] for row in rows]
    return [
        values[i] / ((values[i - 1] + values[i + 1]) / 2) - 1 for i in range(1, len(values) - 1) if rows[i]["saves"]
    ]


def told(found: dict[str, Any], ranks: list[dict[str, Any]]) -> str:
    """The record for people."""
    each, busier = (", ".join(f"{value:+.1%}" for value in found[name]) for name in ("longer", "busier"))
    lines = [
        f"{ranks[0]['parameters'] / 1e6:.0f} M parameters on {WORLD} ranks, {found['bytes'] / 1e9:.2f} GB a save, "
        f"segments of {ranks[0]['steps_per_segment']} steps.",
        "",
        "| | measured | bar |",
        "|---|---|---|",
        f"| a minute with a save beside its neighbours without | {found['longer_median']:+.1%} (each: {each}) | +5 % |",
        f"| the same in processor time | {found['busier_median']:+.1%} (each: {busier}) | |",
        f"| it stands still | {found['stall_most']:.2f} s at most, median {found['stall_median']:.2f} s | 0.5 |",
        f"| complete after | {', '.join(f'{value:.1f}' for value in found['complete_after'])} s | |",
        f"| kept buffers made, once | {max(rank['buffers_made_in'] for rank in ranks):.1f} s | |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=6, help="segments of a minute, every other one with a save")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDS}/saving.*")
    asked = parser.parse_args()
    by_rank = measured(asked.minutes)
    totals = summary(by_rank)
    print(told(totals, by_rank))
    if asked.record:
        record = {"environment": environment(WORLD), "ranks": by_rank, "summary": totals}
        (RECORDS / "saving.json").write_text(json.dumps(record, indent=1) + "\n")
        command = f"python -m benchmarks.saving --minutes {asked.minutes}"
        machine = f"{environment(WORLD)['cpu']}, {os.cpu_count()} cores"
        (RECORDS / "saving.md").write_text(f"`{command}`, {machine}\n\n{told(totals, by_rank)}\n")
    passed = totals["longer_median"] < BAR_LONGER and totals["stall_most"] < BAR_STALL
    sys.exit(0 if passed else 1)
