"""Ways to damage a checkpoint or a Hugging Face directory, each drawn at random: what the fuzz tests do to a copy.

A mutation gets the copy and a source of chance. Beside the copy lies `outside`, with whole copies of the same files: a
reader that follows a path out of the directory finds there all that it wants, and raises nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, Path], object]

MANIFEST = "manifest.json"
JUNK: list[Any] = [
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(2**70), 10**400),
    *(0.5, 1.0, math.nan, math.inf, -math.inf, 1e308),
    *("", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "a\nb", "é", "F8_E4M3", "x" * 5000),
    *([], {}, [[]], [None], [-1], [0], [2**62] * 3, [1] * 40, {"": 0}, {"a": {"b": []}}, [[[[[[]]]]]]),
]
NAMES = [
    *("../{0}", "../outside/{0}", "/etc/passwd", "/dev/zero", "/proc/self/mem", "./{0}", "x/../{0}", "{0}\0", "{0}\n"),
    *("", ".", "..", "~/{0}", "C:\\{0}", "..\\{0}", "{0}/", "//{0}", "%2e%2e/{0}", "é{0}", "-{0}", ".{0}", "{0}.pt"),
]
HUGE = [2**31, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def trap_of(copy: Path) -> Path:
    """Where code that was in a copy leaves its trace."""
    return copy.with_name("sprung")


def tensor_files(copy: Path) -> list[Path]:
    return sorted(path for path in copy.iterdir() if path.name.endswith(".safetensors"))


# The manifest


def checksum_of(content: dict[str, Any]) -> str:
    content = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read(copy: Path) -> dict[str, Any]:
    return json.loads((copy / MANIFEST).read_text())


def write(copy: Path, content: Any, signed: bool = True) -> None:
    if signed and isinstance(content, dict):
        content["checksum"] = checksum_of(content)
    (copy / MANIFEST).write_text(json.dumps(content, indent=1))


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield node, key
        yield from places(node[key])


def disturb(draw: random.Random, content: Any, ways: int = 5) -> None:
    """Drop, double, rename, replace or exchange something somewhere in a document."""
    node, key = draw.choice(list(places(content)))
    way = draw.randrange(ways)
    if way == 0:
        del node[key]
    elif way == 1 and isinstance(node, list):
        node.insert(key, node[key])
    elif way == 2 and isinstance(node, dict):
        node[draw.choice(["x", "", key + "s", "../x", "a\nb"])] = node.pop(key)
    elif way == 4:
        other = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node[key], node[other] = node[other], node[key]
    else:
        node[key] = draw.choice(JUNK)


def disturbed(draw: random.Random, copy: Path) -> None:
    content = read(copy)
    disturb(draw, content)
    write(copy, content, signed=False)


def disturbed_and_signed(draw: random.Random, copy: Path) -> None:
    content = read(copy)
    for _ in range(draw.randint(1, 3)):
        disturb(draw, content)
    write(copy, content)


def field(draw: random.Random, copy: Path) -> None:
    """A value of a kind that its field never has."""
    content = read(copy)
    file = draw.choice(content["files"])
    box = draw.choice(file["boxes"] or content["files"][0]["boxes"])
    tables = [content, file, box, content["training"], content["architecture"], content["kinds"], content["tensors"]]
    table = draw.choice(tables)
    table[draw.choice(sorted(set(table) - {"plan", "checksum"}))] = draw.choice(JUNK)
    write(copy, content)


def file_name(draw: random.Random, copy: Path) -> None:
    content = read(copy)
    file = draw.choice(content["files"])
    file["name"] = draw.choice(NAMES).format(file["name"])
    write(copy, content)


def file_claims(draw: random.Random, copy: Path) -> None:
    content = read(copy)
    file = draw.choice(content["files"])
    if draw.random() < 0.6:
        file["bytes"] = draw.choice([*HUGE, -1, 0, file["bytes"] - 1, file["bytes"] + 1, float(file["bytes"])])
    else:
        digest = file["sha256"]
        file["sha256"] = draw.choice([digest[::-1], digest.upper(), digest[:-1], "0" * 64, digest + "0", ""])
    write(copy, content)


def box_claims(draw: random.Random, copy: Path) -> None:
    """Offsets and sizes that are outside, huge, negative, or of another number of dimensions."""
    content = read(copy)
    box = draw.choice([box for file in content["files"] for box in file["boxes"]])
    numbers = box[draw.choice(["offset", "size"])]
    if draw.random() < 0.3:
        numbers.append(draw.choice([0, 1]))
    else:
        numbers[draw.randrange(len(numbers))] = draw.choice([*HUGE, -1, 0, 10**400, numbers[0] + 1, numbers[0] - 1])
    if draw.random() < 0.3:  # and the tensor says the same
        content["tensors"][box["name"]] = [o + s for o, s in zip(box["offset"], box["size"], strict=False)]
    write(copy, content)


def box_cover(draw: random.Random, copy: Path) -> None:
    """Boxes that lie over each other, leave holes, or both, so that their elements are as many as before."""
    content = read(copy)
    file = draw.choice([file for file in content["files"] if file["boxes"]])
    box = draw.choice(file["boxes"])
    if draw.random() < 0.3:
        others = [other for other in file["boxes"] if other["size"] == box["size"] and other is not box]
        box |= draw.choice(others) if others else {"name": "x"}
    else:
        dim = max(range(len(box["size"])), key=lambda dim: box["size"][dim])
        length = box["size"][dim]
        half, at = length // 2, draw.choice([0, 1, length // 2 - 1])
        first, second = json.loads(json.dumps(box)), json.loads(json.dumps(box))
        first["size"][dim], second["size"][dim] = half, length - half
        second["offset"][dim] += at
        file["boxes"][file["boxes"].index(box)] = first
        file["boxes"].append(second)
    write(copy, content)


def kinds_and_shapes(draw: random.Random, copy: Path) -> None:
    content = read(copy)
    kinds, tensors, name = content["kinds"], content["tensors"], draw.choice(sorted(content["tensors"]))
    way = draw.randrange(6)
    if way == 0:
        kinds[draw.choice(sorted(kinds))] = draw.choice(["F64", "F16", "BF16", "I32", "F8_E5M2", "", None, 32])
    elif way == 1:
        del kinds[draw.choice(sorted(kinds))]
    elif way == 2:
        kinds[draw.choice(["more", "", "../x"])] = "F32"
    elif way == 3:
        tensors[name] = draw.choice([[2**31, 2**31], [0], [-1], [], [1] * 64, [2**63], [True], 4, None, "16"])
    elif way == 4:
        del tensors[name]
    else:
        tensors["more"] = [draw.choice([1, *HUGE])]
    write(copy, content)


def raw_text(draw: random.Random, copy: Path) -> None:
    """What is no JSON, or JSON that parsers disagree about; the checksum is right where there can be one."""
    path, text, depth = copy / MANIFEST, (copy / MANIFEST).read_text(), 10 ** draw.randint(3, 6)
    twice = text.replace('"version": 1', '"version": 1,\n "version": 1')
    deep = {"plan": json.loads("[" * 900 + "]" * 900)}
    ways: list[bytes] = [
        *(b"", b"null", b"[]", b"{}", b"0", b"{", b"\xff" * 40, b"\0" * 4096, b'"' + b"x" * 4096, b"NaN"),
        *(text.encode("utf-16"), text.encode() + b"}", text.encode() + b"\0", b"\xef\xbb\xbf" + text.encode()),
        *(twice.encode(), text.encode().replace(b"checkpoint", b"check\xe9oint", 1), text[: len(text) // 2].encode()),
        *(b"[" * depth, b'{"a":' * depth, b'{"checksum": ' + b"9" * depth + b"}", b"-" + b"1" * depth),
        *(text.replace('"step": ', '"step": ' + "9" * 5000).encode(), text.replace('"step": ', '"step": -').encode()),
        *(text.replace('"step": ', '"step": NaN, "x": ').encode(), pickle.dumps(Trap(trap_of(copy)))),
        json.dumps({**read(copy), **deep}).encode(),
    ]
    path.write_bytes(draw.choice(ways))


# Files of any kind


def cut_short(draw: random.Random, path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, draw.choice([0, 1, 7, 8, 9, size - 1, size // 2, draw.randrange(size)]))


def flipped(draw: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 4])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def grown(draw: random.Random, path: Path) -> None:
    if draw.random() < 0.5:
        os.truncate(path, draw.choice([2**33, 2**36, 2**40]))  # on no disk: holes
    else:
        with path.open("ab") as file:
            file.write(draw.randbytes(draw.randint(1, 100)))


def exchanged(draw: random.Random, path: Path) -> None:
    """Something else in a file's place: nothing, a link, a pipe, a directory, another file, a pickle."""
    other = path.parent.with_name("outside") / path.name
    content = path.read_bytes()
    path.unlink()
    way = draw.choice([0, 1, 1, 1, 1, *range(2, 9)])
    if way == 1:
        near = os.path.relpath(other, path.parent)
        path.symlink_to(draw.choice([other, near, near, "/etc/passwd", "/dev/zero", path.name]))
    elif way == 2:
        os.mkfifo(path)
    elif way == 3:
        path.mkdir()
    elif way == 4:
        path.write_bytes(pickle.dumps(Trap(trap_of(path.parent)), protocol=draw.randint(0, 5)))
    elif way == 5:
        path.write_bytes(pickle.dumps({"weights": Trap(trap_of(path.parent))}).ljust(len(content), b"\0"))
    elif way == 6:
        path.write_bytes(b"PK\3\4" + draw.randbytes(len(content) - 4))
    elif way == 7:
        path.write_bytes(draw.randbytes(len(content)))
    elif way == 8:
        path.write_bytes(content[8:] + content[:8])


# Headers of tensor files

DTYPES = ["F64", "F32", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", "float32", None, 7, ["F32"]]


def header(draw: random.Random, path: Path) -> None:
    """Another length of the header, or other claims in it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    if draw.random() < 0.25:
        claim = draw.choice([0, 1, length - 1, length + 1, len(content), 10**8 + 1, *HUGE])
        path.write_bytes(struct.pack("<Q", claim) + content[8:])
        return
    told = json.loads(content[8 : 8 + length])
    entry = told[draw.choice(sorted(set(told) - {"__metadata__"}))]
    way = draw.randrange(5)
    if way == 0:
        entry["dtype"] = draw.choice([dtype for dtype in [*DTYPES, *["I32", "U32"] * 7] if dtype != entry["dtype"]])
    elif way == 1:
        entry["data_offsets"][draw.randrange(2)] += draw.choice([-(10**6), -8, -1, 1, 8, 10**6, *HUGE])
    elif way == 2:
        entry["shape"] = draw.choice([[2**32, 2**32], [0], [-1], [], [1, *entry["shape"]], entry["shape"][:-1], HUGE])
    elif way == 3:
        disturb(draw, told, ways=4)  # two tensors exchanged would be another file, and a good one
    else:
        entry["data_offsets"] = draw.choice(list(told.values()))["data_offsets"] if len(told) > 1 else [0, 0]
    text = json.dumps(told).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def sign_files(copy: Path) -> None:
    """Let a manifest say what its files are now."""
    content = read(copy)
    for file in content["files"]:
        written = (copy / file["name"]).read_bytes()
        file["bytes"], file["sha256"] = len(written), hashlib.sha256(written).hexdigest()
    write(copy, content)
