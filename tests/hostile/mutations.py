"""Random or malicious changes of files; each change is determined by its number."""

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import yaml

from repa.base.files import SEAL

HOSTILE = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, -(2**70), 10**400, 1e308,
    float("nan"), float("inf"), 0.5, "", " ", "0", "²", "x", "../..", "/etc/passwd",
    "/dev/zero", "a\x1b[31mb", "\u202eevil", "é" * 300, "9" * 5000, "os.system", "subprocess.Popen:args=x", "~", ":", ":=", "a:b=", "\0",
    "pca-1", "pca999999-int8", "tiny", "pixels", "nt_xent:temperature=0", [], {}, [[]], [{}], {"a": {"b": []}}, [1, "a", None], "SiT-XL/2",
    "float64", "object", "<f8",
)  # fmt: skip


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all leaves and branches in plain values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, item in items:
        found += leaves(item, (*path, key))
    return found


def mutated_tree(values: Any, number: int) -> Any:
    """Plain values with one to three entries replaced, removed, duplicated or renamed."""
    draw = random.Random(number)
    values = copy.deepcopy(values)
    for _ in range(draw.choice((1, 1, 2, 3))):
        paths = leaves(values)
        if not paths:
            return draw.choice(HOSTILE)
        *above, last = draw.choice(paths)
        owner = values
        for key in above:
            owner = owner[key]
        what = draw.randrange(6)
        if what <= 2:
            owner[last] = copy.deepcopy(draw.choice(HOSTILE))
        elif what == 3:
            del owner[last]
        elif what == 4 and isinstance(owner, dict):
            owner[draw.choice(("unknown", "x\x1b]0;t\x07", str(last) + "s", ""))] = owner.pop(last)
        elif isinstance(owner[last], list):
            owner[last] = owner[last] * 2
        else:
            owner[last] = [owner[last]]
    return values


def mutated_bytes(data: bytes, number: int) -> bytes:
    """Flip, truncate, duplicate, replace or nest bytes; the result always differs from the input."""
    draw = random.Random(number)
    place = draw.randrange(len(data)) if data else 0
    what = draw.randrange(9)
    if what <= 2 and data:
        changed = bytearray(data)
        for at in {place, *(draw.randrange(len(data)) for _ in range(draw.choice((0, 0, 3, 30))))}:
            changed[at] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if what == 3:
        return data[:place]
    if what == 4:
        return data + data[-draw.randint(1, 64) :]
    if what == 5:
        return draw.choice(
            (b"", b"\0" * len(data), b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe\xff", b"- " * 20_000, b"&a [*a]\n")
        )
    if what == 6:
        size = draw.randint(1, max(1, len(data) // 2))
        return data[:place] + data[place + size :] if data[place : place + size] else data + b"x"
    if what == 7:
        return data[:place] + draw.randbytes(draw.randint(1, 16)) + data[place:]
    return mutated_header(data, draw)


def mutated_header(data: bytes, draw: random.Random) -> bytes:
    """Change a number in the header of a file: a length, a shape or an offset."""
    numbers = list(re.finditer(rb"\d+", data[:4096]))
    if not numbers or data[8:9] not in b'{"\x76':
        return draw.choice((2**63 - 1, 2**40, 0, 7)).to_bytes(8, "little") + data[8:]
    match = draw.choice(numbers)
    other = draw.choice((b"0", b"-1", b"99999999999999999999", b"18446744073709551615", b"4294967296"))
    changed = data[: match.start()] + other + data[match.end() :]
    return changed if changed != data else data + b"x"


def mutate_file(path: Path, number: int) -> None:
    """Change a file in place: YAML and JSON mostly as trees, other files as bytes."""
    data = path.read_bytes()
    if path.suffix == ".yaml" and number % 4:
        changed = yaml.safe_dump(
            mutated_tree(yaml.safe_load(data), number), allow_unicode=True, sort_keys=False
        ).encode("utf-8", "replace")
    elif path.suffix == ".json" and number % 4:
        tree = json.loads(data)
        if number % 3 and isinstance(tree, dict):
            tree.pop(SEAL, None)  # like someone who changes the file on purpose
        changed = json.dumps(mutated_tree(tree, number)).encode()
    else:
        changed = mutated_bytes(data, number)
    path.write_bytes(changed)
