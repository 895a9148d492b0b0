"""Weight files of old torch are read without torch, and a bad one is refused without running any of it."""

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from touchline.core.errors import TouchlineError
from touchline.models import torch_weights

HEADER = pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(1001) + pickle.dumps({"little_endian": True})


def tensor(kind: str, key: str, count: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    """A tensor as torch pickles it, in the readable opcodes of protocol 0."""
    storage = f"(Vstorage\nctorch\n{kind}\nV{key}\nVcpu\nI{count}\nNtQ"
    numbers = "".join(f"({''.join(f'I{number}' + chr(10) for number in group)}t" for group in (shape, strides))
    return f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I{offset}\n{numbers}I00\nNtR".encode()


def state_dict(**tensors: bytes) -> bytes:
    items = b"".join(b"V" + name.encode() + b"\n" + value + b"s" for name, value in tensors.items())
    return b"ccollections\nOrderedDict\n(tR" + items + b"."


def storage(values: np.ndarray) -> bytes:
    return struct.pack("<q", values.size) + values.tobytes()


def write(path: Path, *parts: bytes) -> tuple[Path, str]:
    content = b"".join(parts)
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


SIX = np.arange(6, dtype="<f4")
KERNEL = tensor("FloatStorage", "a", 6, (2, 3), (3, 1))


def test_tensors_come_back_by_name_whatever_their_strides(tmp_path: Path) -> None:
    state = state_dict(
        kernel=KERNEL,
        transposed=tensor("FloatStorage", "a", 6, (3, 2), (1, 3)),
        last=tensor("FloatStorage", "a", 6, (2,), (1,), offset=4),
        steps=tensor("LongStorage", "b", 1, (), ()),
    )
    file = write(
        tmp_path / "w.pth", HEADER, state, pickle.dumps(["b", "a"]), storage(np.array([7], "<i8")), storage(SIX)
    )

    tensors = torch_weights.read(*file)

    np.testing.assert_array_equal(tensors["kernel"], SIX.reshape(2, 3))
    np.testing.assert_array_equal(tensors["transposed"], SIX.reshape(2, 3).T)
    np.testing.assert_array_equal(tensors["last"], [4, 5])
    assert tensors["steps"] == 7 and tensors["steps"].dtype == np.int64 and tensors["kernel"].dtype == np.float32


def test_nothing_of_a_hostile_file_is_run(tmp_path: Path) -> None:
    victim = tmp_path / "touched"
    hostile = b"cposix\nsystem\n(V" + f"touch {victim}".encode() + b"\ntR."
    pickle.loads(hostile)
    assert victim.exists(), "the file is hostile indeed"
    victim.unlink()

    path, digest = write(tmp_path / "w.pth", HEADER, hostile)
    with pytest.raises(TouchlineError, match=r"posix\.system"):
        torch_weights.read(path, digest)
    with pytest.raises(TouchlineError, match="sha256"):
        torch_weights.read(path, "0" * 64)
    assert not victim.exists()


KEYS = pickle.dumps(["a"])
FAULTS = {
    "empty": ([], "not a readable torch weight file"),
    "new format": ([b"PK\x03\x04rest"], "not a readable torch weight file"),
    "other magic": ([pickle.dumps(1), pickle.dumps(1001), pickle.dumps({"little_endian": True})], "format before"),
    "no tensors": ([HEADER, b"ccollections\nOrderedDict\n(tRVa\nI1\ns.", KEYS], "other than tensors"),
    "unknown key": ([HEADER, state_dict(k=KERNEL), pickle.dumps(["a", "z"]), storage(SIX)], "list of storages"),
    "key twice": ([HEADER, state_dict(k=KERNEL), pickle.dumps(["a", "a"]), storage(SIX)], "list of storages"),
    "wrong count": ([HEADER, state_dict(k=KERNEL), KEYS, storage(SIX[:5])], "should hold 6 values and says 5"),
    "truncated": ([HEADER, state_dict(k=KERNEL), KEYS, storage(SIX)[:-1]], "ends within storage a"),
    "goes on": ([HEADER, state_dict(k=KERNEL), KEYS, storage(SIX), b"!"], "goes on after"),
    "out of bounds": (
        [HEADER, state_dict(k=tensor("FloatStorage", "a", 6, (2, 3), (4, 1))), KEYS, storage(SIX)],
        "beyond its storage a",
    ),
    "negative stride": (
        [HEADER, state_dict(k=tensor("FloatStorage", "a", 6, (2,), (-1,))), KEYS, storage(SIX)],
        "impossible shape",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_one_line_that_says_why(fault: str, tmp_path: Path) -> None:
    parts, reason = FAULTS[fault]
    with pytest.raises(TouchlineError, match=reason) as error:
        torch_weights.read(*write(tmp_path / "w.pth", *parts))
    assert "w.pth" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(TouchlineError, match=r"w\.pth"):
        torch_weights.read(tmp_path / "w.pth", "0" * 64)
