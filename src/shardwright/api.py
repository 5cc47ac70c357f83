"""Shardwright from Python: load a recipe, resolve a plan, compose a model, run steps. docs/api.md shows it at work.

    import shardwright.api as sw

A program is a module with `main(worker, arguments)`; `sw.run(sw.Job(world_size=2, entry="my_program"))` runs it on
2 ranks of this machine, or joins the job of torchrun or srun.
"""

from __future__ import annotations

from shardwright.checkpoint.load import Checkpoint
from shardwright.checkpoint.save import save
from shardwright.comm.job import Job
from shardwright.comm.launch import run
from shardwright.comm.mesh import Mesh
from shardwright.comm.worker import Worker
from shardwright.data.batch import IGNORED, Batch
from shardwright.data.dataset import Dataset
from shardwright.errors import ShardwrightError
from shardwright.infer.generator import Completion, Generator
from shardwright.infer.settings import Settings
from shardwright.nn.decoder import Decoder
from shardwright.nn.linear import Linear
from shardwright.nn.loss import linear_cross_entropy
from shardwright.nn.parameters import Declaration, Part
from shardwright.nn.vocabulary import Output
from shardwright.optim.optimizers import make_optimizer
from shardwright.optim.schedule import learning_rate
from shardwright.parallel.compose import Runtime, compose
from shardwright.parallel.tensor.rules import Colwise, Heads, Replicated, Rowwise, Table, Vocabulary
from shardwright.plan.plan import Plan
from shardwright.spec.load import build, load
from shardwright.spec.spec import Spec
from shardwright.train.batches import rank_batch
from shardwright.train.evaluate import evaluate
from shardwright.train.prepare import open_data, plan_for
from shardwright.train.run import train
from shardwright.train.step import StepResult, train_step
from shardwright.verify.run import verify

__all__ = [
    "IGNORED",
    "Batch",
    "Checkpoint",
    "Colwise",
    "Completion",
    "Dataset",
    "Declaration",
    "Decoder",
    "Generator",
    "Heads",
    "Job",
    "Linear",
    "Mesh",
    "Output",
    "Part",
    "Plan",
    "Replicated",
    "Rowwise",
    "Runtime",
    "Settings",
    "ShardwrightError",
    "Spec",
    "StepResult",
    "Table",
    "Vocabulary",
    "Worker",
    "build",
    "compose",
    "evaluate",
    "learning_rate",
    "linear_cross_entropy",
    "load",
    "make_optimizer",
    "open_data",
    "plan_for",
    "rank_batch",
    "run",
    "save",
    "train",
    "train_step",
    "verify",
]
