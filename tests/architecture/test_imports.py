"""One import direction: every import of the package, those inside functions too, goes up the house and never round."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "shardwright"
SOURCE = Path(__file__).parents[2] / "src" / PACKAGE

# The order that docs/architecture.md gives. `record` stands above `cost`: an estimate is a record as a measurement is.
# `data` stands in the upper half: it is numpy and files, and preparing a corpus needs no torch.
UPPER = ("errors", "units", "spec", "layout", "record", "schedule", "cost", "plan", "report", "data")
LOWER = ("comm", "nn", "optim", "parallel", "checkpoint", "train", "infer", "verify", "compare", "cli")
LOWER += ("__main__", "api")
HOUSE = UPPER + LOWER
NOT_IN_NN = ("comm", "schedule", "parallel")  # the model as one device would write it


@dataclass(frozen=True)
class Import:
    """A file imports a module or a name of one; `top` says that it does so when it is itself imported."""

    file: str  # dotted, without the package: spec.load
    line: int
    target: str  # dotted, with the package: shardwright.spec.load, torch.nn
    top: bool

    def __str__(self) -> str:
        return f"{self.file.replace('.', '/')}.py:{self.line} imports {self.target}"


def read_package(root: Path) -> dict[str, list[Import]]:
    """Every import of every file under `root`, by the file's dotted name; a folder's __init__ has the folder's name."""
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        package = ".".join((PACKAGE, *parts[:-1]))
        files[name] = list(_imports(ast.parse(path.read_text()), name, package))
    return files


def _imports(tree: ast.Module, file: str, package: str) -> Iterator[Import]:
    deferred = _deferred(tree)
    for node in ast.walk(tree):
        for target in _targets(node, package):
            yield Import(file, getattr(node, "lineno", 0), target, node not in deferred)


def _deferred(tree: ast.Module) -> set[ast.AST]:
    """What does not run when the file is imported: bodies of functions, and of `if TYPE_CHECKING`."""
    deferred: set[ast.AST] = set()
    for node in ast.walk(tree):
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if checking or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            deferred.update(ast.walk(node))
    return deferred


def _targets(node: ast.AST, package: str) -> list[str]:
    """What a node imports: by statement, by import_module, or by reaching into torch.distributed."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
            return [".".join([*base, *([module] if module else []), alias.name]) for alias in names]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(target)), *_]):
            return [target] if name in ("import_module", "__import__") else []
        case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
            return ["torch.distributed"]
    return []


def _inside(target: str, module: str) -> bool:
    return target == module or target.startswith(module + ".")


def _folder(dotted: str) -> str:
    return dotted.split(".")[0]


def _own_folder(found: Import) -> str | None:
    """The folder of this package that an import reaches; "" is the package itself, None is another package."""
    if not _inside(found.target, PACKAGE):
        return None
    folder = _folder(found.target.removeprefix(PACKAGE).lstrip("."))
    return "" if folder == "__version__" else folder


def wrong_direction(files: dict[str, list[Import]]) -> list[str]:
    """(a) A file imports from its own folder or from above. The package's __init__ imports from the upper half."""
    wrong = []
    for found in (found for imports in files.values() for found in imports):
        target, here = _own_folder(found), _folder(found.file)
        if not target:
            continue
        if {target, here} - {*HOUSE, ""}:
            wrong.append(f"{found}: not a room of the house")
        elif HOUSE.index(target) > (HOUSE.index(here) if here else len(UPPER) - 1):
            wrong.append(f"{found}: below it")
    return wrong


def torch_too_high(files: dict[str, list[Import]]) -> list[str]:
    """(b) The upper half, the command line and the package itself import no torch; the command line defers the rest."""
    wrong = []
    for found in (found for imports in files.values() for found in imports):
        here = _folder(found.file)
        if (here in UPPER or here in ("cli", "__main__", "")) and _inside(found.target, "torch"):
            wrong.append(f"{found}: no torch here")
        if here == "cli" and found.top and _own_folder(found) not in (None, "", "cli", *UPPER):
            wrong.append(f"{found}: inside the command's body only")
    return wrong


def distributed_elsewhere(files: dict[str, list[Import]]) -> list[str]:
    """(c) Only comm/ talks to torch.distributed."""
    outside = (found for imports in files.values() for found in imports if _folder(found.file) != "comm")
    return [f"{found}: only comm/ may" for found in outside if _inside(found.target, "torch.distributed")]


def parallel_model(files: dict[str, list[Import]]) -> list[str]:
    """(d) nn/ knows of no parallelism and no communication."""
    inside = (found for imports in files.values() for found in imports if _folder(found.file) == "nn")
    return [f"{found}: not in nn/" for found in inside if _own_folder(found) in NOT_IN_NN]


def cycles(files: dict[str, list[Import]]) -> list[str]:
    """(e) Files do not import each other in a circle, not even from inside functions."""
    graph = {file: {_file(found.target, files) for found in imports} - {None} for file, imports in files.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(str(file) or PACKAGE for file in error.args[1])]
    return []


def _file(target: str, files: dict[str, list[Import]]) -> str | None:
    """The file that an import reads: the module itself, or the one that holds the name."""
    if not _inside(target, PACKAGE):
        return None
    dotted = target.removeprefix(PACKAGE).lstrip(".")
    return dotted if dotted in files else dotted.rpartition(".")[0]


CHECKS = (wrong_direction, torch_too_high, distributed_elsewhere, parallel_model, cycles)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_house(check) -> None:
    files = read_package(SOURCE)
    assert len(files) > 20
    assert check(files) == []


PLANTED = [
    (wrong_direction, {"spec/a.py": "def f():\n    from shardwright.plan.plan import Plan\n"}),
    (wrong_direction, {"nn/a.py": "from ..train import step\n", "train/step.py": ""}),
    (wrong_direction, {"units.py": "import importlib\nimportlib.import_module('shardwright.spec.load')\n"}),
    (wrong_direction, {"__init__.py": "from shardwright.train import step\n", "train/step.py": ""}),
    (wrong_direction, {"attic/a.py": "from shardwright.errors import ShardwrightError\n"}),
    (torch_too_high, {"plan/a.py": "def f():\n    import torch\n"}),
    (torch_too_high, {"data/a.py": "from torch.utils import data\n"}),
    (torch_too_high, {"cli/a.py": "from shardwright.train import run\n"}),
    (torch_too_high, {"cli/a.py": "def f():\n    import torch\n"}),
    (distributed_elsewhere, {"train/a.py": "from torch import distributed\n"}),
    (distributed_elsewhere, {"parallel/a.py": "import torch.distributed as dist\n"}),
    (distributed_elsewhere, {"optim/a.py": "import torch\n\n\ndef f():\n    torch.distributed.barrier()\n"}),
    (parallel_model, {"nn/a.py": "from shardwright.comm.mesh import Mesh\n"}),
    (
        cycles,
        {"nn/a.py": "from shardwright.nn import b\n", "nn/b.py": "def f():\n    from shardwright.nn.a import x\n"},
    ),
]


@pytest.mark.parametrize(("check", "planted"), PLANTED)
def test_planted_violations_are_found(check, planted: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, planted)
    assert len(check(read_package(tmp_path))) == 1


def test_an_honest_house_passes(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "__init__.py": "__version__ = '1'\n",
            "spec/load.py": "from shardwright.errors import RecipeError\nfrom .spec import Spec\n",
            "spec/spec.py": "from shardwright import __version__\n",
            "comm/mesh.py": "import torch.distributed\nfrom shardwright.layout import mesh\n",
            "layout/mesh.py": "",
            "train/run.py": "import torch\nfrom shardwright.comm.mesh import Mesh\n",
            "cli/train.py": "def train():\n    from shardwright.train import run\n",
        },
    )
    files = read_package(tmp_path)
    assert [check(files) for check in CHECKS] == [[]] * len(CHECKS)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
