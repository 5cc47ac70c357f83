"""Reading checkpoints: any box of any tensor, whatever boxes were written, through memory maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from shardwright.checkpoint.files import TensorFile, one_line, require_file, sha256_of
from shardwright.checkpoint.manifest import WEIGHTS, Manifest, StoredFile, read_manifest
from shardwright.checkpoint.snapshot import file_name
from shardwright.checkpoint.state import RANDOM_STATES, restore_moments
from shardwright.errors import CheckpointError
from shardwright.layout.box import Box
from shardwright.nn.initial import Values
from shardwright.optim.optimizers import SGD, AdamW
from shardwright.parallel.compose import Runtime
from shardwright.spec.origin import COMPANIONS, origin_of

_ANOTHER = "use another checkpoint, or another copy of this one"


class Checkpoint:
    """A complete checkpoint. Files are opened when something is read from them."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._files: dict[str, TensorFile] = {}

    @staticmethod
    def open(path: str | Path) -> Checkpoint:
        """The checkpoint in a directory, or the newest of a run directory. Raises ShardwrightError where its manifest
        is damaged; files are not looked at yet."""
        path = Path(path).expanduser()
        if not (path / "manifest.json").exists() and (path / "checkpoints").is_dir():
            path = origin_of(str(path), "checkpoint")[1]
        return Checkpoint(path, read_manifest(path))

    @property
    def weights(self) -> Values:
        """The parameters."""
        return self.kind(WEIGHTS)

    def kind(self, kind: str) -> Values:
        """The tensors of one kind, such as "exp_avg". Raises CheckpointError where it has none."""
        if kind not in self.manifest.kinds:
            has = ", ".join(self.manifest.kinds)
            raise CheckpointError(f"{self.path}: has no {kind}, but {has}", "start from its weights: model.init_from")
        return _Kind(self, kind)

    @property
    def companions(self) -> Path:
        """The small files that travel with the weights; the directory need not be there."""
        return self.path / COMPANIONS

    def check_file(self, file: StoredFile, progress: Callable[[int], None] = lambda _: None) -> None:
        """Read a whole file and compare its size and checksum with the manifest's. Raises CheckpointError."""
        path = self.path / file.name
        require_file(path, file.bytes)
        if sha256_of(path, progress) != file.sha256:
            raise CheckpointError(f"{path}: damaged: its bytes are not those that were written", _ANOTHER)

    def check(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """`check_file` for every file, and whether they hold what the manifest says. Raises CheckpointError."""
        for file in self.manifest.files:
            self.check_file(file, progress)
            self.tensor_file(file)
        self.check_companions()

    def check_companions(self) -> None:
        """The same for the small files that travel with the weights. Raises CheckpointError."""
        listed = {companion.name: companion for companion in self.manifest.companions}
        if self.companions.is_symlink():
            raise CheckpointError(f"{self.companions}: not a directory of its own", _ANOTHER)
        there = {path.name for path in self.companions.iterdir()} if self.companions.is_dir() else set()
        if unlisted := sorted(there - set(listed)):
            raise CheckpointError(f"{self.companions}: {one_line(unlisted[0])} was not written by a save", _ANOTHER)
        for name, companion in listed.items():
            require_file(self.companions / name, companion.bytes)
            if sha256_of(self.companions / name) != companion.sha256:
                raise CheckpointError(
                    f"{self.companions / name}: damaged: its bytes are not those that were written", _ANOTHER
                )

    def tensor_file(self, file: StoredFile) -> TensorFile:
        """An open file, with the tensors that the manifest lists for it. Raises CheckpointError."""
        if file.name not in self._files:
            require_file(self.path / file.name, file.bytes)
            opened = TensorFile(self.path / file.name)
            for box in file.boxes:
                stored = box.key in opened.keys and (opened.dtype(box.key), opened.shape(box.key))
                if stored != (self.manifest.kinds[box.kind], box.size):
                    raise CheckpointError(f"{opened.path}: does not hold {box.key}", _ANOTHER)
            self._files[file.name] = opened
        return self._files[file.name]

    @cached_property
    def stored(self) -> dict[tuple[str, str], list[_Stored]]:
        """The boxes of every tensor, by kind and name."""
        found: dict[tuple[str, str], list[_Stored]] = {}
        for file, entry, box in self.manifest.boxes():
            found.setdefault((entry.kind, entry.name), []).append(_Stored(file, entry.key, box))
        return found

    def restore(self, runtime: Runtime, optimizer: AdamW | SGD) -> None:
        """Give an optimizer the state that was saved, on whatever layout. Raises CheckpointError for weights alone, and
        where another optimizer was saved."""
        training = self.manifest.training
        if training is None:
            raise CheckpointError(f"{self.path}: holds weights alone", "start with a fresh optimizer")
        restore_moments(runtime, optimizer, {kind: self.kind(kind) for kind in optimizer.names}, training)

    def random_states(self, rank: int) -> list[tuple[str, Tensor]]:
        """The random state that a rank wrote."""
        file = next((file for file in self.manifest.files if file.name == file_name(rank)), None)
        if file is None:
            return []
        opened = self.tensor_file(file)
        return [(key, opened.tensor(key)) for key in RANDOM_STATES if key in opened.keys]


@dataclass(frozen=True)
class _Stored:
    """A box and where it is."""

    file: StoredFile
    key: str
    box: Box


@dataclass(frozen=True)
class _Kind:
    """Tensors of one kind of a checkpoint; see `Values`."""

    checkpoint: Checkpoint
    kind: str

    def read(self, box: Box, out: Tensor) -> None:
        """Copy what the stored boxes have of this one. Raises CheckpointError where that is not all of it."""
        self._check_shape(box)
        target, left = out.view(box.size), box.numel
        for stored in self.checkpoint.stored.get((self.kind, box.name), []):
            common = box.intersect(stored.box)
            if common is not None:
                tensor = self.checkpoint.tensor_file(stored.file).tensor(stored.key)
                target[_within(common, box)].copy_(tensor[_within(common, stored.box)])
                left -= common.numel
        if left:
            raise CheckpointError(f"{self.checkpoint.path}: {left} elements of {self.kind}/{box} are missing", _ANOTHER)

    def _check_shape(self, box: Box) -> None:
        saved = self.checkpoint.manifest.tensors.get(box.name)
        if saved is None:
            raise CheckpointError(
                f"{self.checkpoint.path}: has no tensor {box.name}",
                "use the model that was saved: `shardwright checkpoint inspect` shows it",
            )
        if saved != box.tensor.shape:
            raise CheckpointError(
                f"{self.checkpoint.path}: {box.name} is {list(saved)} there, and {list(box.tensor.shape)} in the model",
                "use the model that was saved: `shardwright checkpoint inspect` shows it",
            )


def _within(part: Box, whole: Box) -> tuple[slice, ...]:
    """Indexes a part within the box that it lies in."""
    starts = (p - w for p, w in zip(part.offset, whole.offset, strict=True))
    return tuple(slice(start, start + size) for start, size in zip(starts, part.size, strict=True))
