"""A manifest comes back as it was written, and every number in it has bounds that are checked."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from tests.reliability.checkpoints import sign, stored_file
from vp_train.checkpoint import manifest as module
from vp_train.checkpoint.manifest import (
    MANIFEST,
    MOST_STEPS,
    AlteredError,
    Manifest,
    StoredFile,
    StoredTensor,
    check_file,
    file_name,
    read_manifest,
    write_manifest,
)
from vp_train.checkpoint.stream import Described, write_tensors
from vp_train.tensors.slices import TensorSlice

MOST_BYTES = MOST_VALUES = 2**60
HASH = hashlib.blake2b(b"").hexdigest()


def tensor(*shape, dtype="float32", **split):
    return {"dtype": dtype, "shape": list(shape), **split}


def part(*ranges, shape=(2, 6), dim=1, **other):
    """Return the entry of the `ranges` of a [2, 6] tensor."""
    return tensor(*shape, dim=dim, ranges=[list(bounds) for bounds in ranges], **other)


def files_of(*entries):
    """Return the files of ranks that hold `entries` of the tensor `x`."""
    return {
        file_name(rank): {"bytes": 8, "blake2b": HASH, "tensors": {"x": entry}}
        for rank, entry in enumerate(entries)
    }


def body(*, step=1, files=None, **changes):
    return {"format": 2, "step": step, "state": {}, "files": files or {}} | changes


def words_of(tmp_path, content):
    """Return what a manifest of this `content` is refused with, empty if it is read."""
    sign(tmp_path, content)
    said = ""
    try:
        read_manifest(tmp_path)
    except AlteredError as error:
        pytest.fail(f"it is signed, but: {error}")
    except ValueError as error:
        said = str(error)
    prefix = f"{tmp_path / MANIFEST} is damaged: "
    assert not said or said.startswith(prefix)
    return said.removeprefix(prefix)


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    split = TensorSlice(1, 6, ((0, 1), (3, 5)))
    tensors = {
        "x": StoredTensor("bfloat16", (2, 6, 3), split),
        "whole": StoredTensor("float64", (4,)),
        "number": StoredTensor("float32", ()),
    }
    files = {file_name(7): StoredFile(8, HASH, tensors)}
    state = {"step": 3, "text": "ä", "nothing": None}
    write_manifest(tmp_path, 3, state, {name: file.as_json() for name, file in files.items()})
    assert read_manifest(tmp_path) == Manifest(3, state, files)


def test_a_file_holds_the_ranges_of_its_tensor_along_their_dimension():
    for dim, held in enumerate([(3, 6, 5), (4, 3, 5), (4, 6, 3)]):
        split = TensorSlice(dim, (4, 6, 5)[dim], ((0, 1), (2, 4)))
        assert StoredTensor("float32", (4, 6, 5), split).shape_in_file == held
    assert StoredTensor("float32", (4, 6, 5)).shape_in_file == (4, 6, 5)


GOOD = {
    "the first step": body(step=0),
    "the last step": body(step=MOST_STEPS),
    "an empty file": body(files={file_name(0): {"bytes": 0, "blake2b": HASH, "tensors": {}}}),
    "the largest file": body(
        files={file_name(0): {"bytes": MOST_BYTES, "blake2b": HASH, "tensors": {}}}
    ),
    "the file of a billionth rank": body(
        files={file_name(10**9 - 1): {"bytes": 0, "blake2b": HASH, "tensors": {}}}
    ),
    "no dimensions": body(files=files_of(tensor())),
    "eight dimensions": body(files=files_of(tensor(*[2] * 8))),
    "no values": body(files=files_of(tensor(0, 3))),
    "the most values": body(files=files_of(tensor(2**30, 2**30))),
    "the first dimension": body(files=files_of(part((0, 2), dim=0))),
    "the last dimension": body(files=files_of(part((0, 6), dim=1))),
    "no ranges": body(files=files_of(part())),
    "ranges that touch": body(files=files_of(part((0, 2), (2, 3)), part((3, 6)))),
    "an empty range in another": body(files=files_of(part((0, 6)), part((3, 3)))),
    "ranges of one value": body(files=files_of(part((1, 2)), part((0, 1)))),
}
OTHER_FILES = ("rank-0.safetensors", "rank-0000000000.safetensors", "../rank-00000.safetensors")
BAD = {
    "another format": (body(format=1), "its format is 1, but this version reads 2"),
    "no state": (body(state=[]), "state is [], which is not an object"),
    "files of a list": (body(files=[1]), "files is [1], which is not an object"),
    **{
        f"step {step}": (body(step=step), f"step is {json.dumps(step)}, which is not a number up")
        for step in (-1, MOST_STEPS + 1, 1.0, True, "1", None)
    },
    **{
        f"{size} bytes": (
            body(files={file_name(0): {"bytes": size, "blake2b": HASH, "tensors": {}}}),
            f"{file_name(0)}: bytes is {json.dumps(size)}, which is not a number up to",
        )
        for size in (-1, MOST_BYTES + 1, True)
    },
    **{
        f"hash {digest!r}": (
            body(files={file_name(0): {"bytes": 0, "blake2b": digest, "tensors": {}}}),
            f"{file_name(0)}: blake2b",
        )
        for digest in (HASH[:-1], HASH + "0", HASH.upper(), 7)
    },
    **{
        f"file {name}": (
            body(files={name: {"bytes": 0, "blake2b": HASH, "tensors": {}}}),
            f"files has {name}, which is not like rank-00000.safetensors",
        )
        for name in OTHER_FILES
    },
    **{
        f"shape {shape}": (
            body(files=files_of({"dtype": "float32", "shape": shape})),
            f"{file_name(0)}: x: shape={json.dumps(shape)} is not a shape",
        )
        for shape in (None, [-1], [2.0], [True], [1] * 9, [2**60 + 1], [2**31, 2**30], [0, 2**61])
    },
    "a dtype of integers": (
        body(files=files_of(tensor(2, dtype="int64"))),
        'x: dtype="int64" is not one of bfloat16, float16, float32, float64',
    ),
    **{
        f"dim {dim}": (
            body(files=files_of(part((0, 2), dim=dim))),
            f"x: dim={json.dumps(dim)} is not a dimension of [2, 6]",
        )
        for dim in (-1, 2, True, None)
    },
    "ranges without a dimension": (
        body(files=files_of(tensor(2, ranges=[[0, 1]]))),
        "x: dim=null is not a dimension of [2]",
    ),
    "a dimension without ranges": (
        body(files=files_of(tensor(2, dim=0))),
        "x: ranges=null are not within 2",
    ),
    **{
        f"range {bounds}": (
            body(files=files_of(part(bounds))),
            f"x: ranges=[{json.dumps(bounds)}] are not within 6",
        )
        for bounds in ([-1, 2], [0, 7], [3, 2], [7, 7], [0], [0, 1, 2], [0, 1.0], [False, 1])
    },
    "parts of different dtypes": (
        body(files=files_of(part((0, 2)), part((2, 6), dtype="float64"))),
        "the parts of x have different shapes or dtypes",
    ),
    "parts of different shapes": (
        body(files=files_of(part((0, 2)), part((2, 6), shape=(3, 6)))),
        "the parts of x have different shapes or dtypes",
    ),
    "parts of different dimensions": (
        body(files=files_of(part((0, 1), dim=0), part((2, 6), dim=1))),
        "x is in more than one file, but not split over them",
    ),
    "a whole tensor twice": (
        body(files=files_of(tensor(2, 6), tensor(2, 6))),
        "x is in more than one file, but not split over them",
    ),
    "a whole tensor and a part": (
        body(files=files_of(tensor(2, 6), part((0, 2)))),
        "x is in more than one file, but not split over them",
    ),
    "parts that share a value": (
        body(files=files_of(part((3, 6)), part((0, 4)))),
        "the parts of x overlap",
    ),
    "a file that has a value twice": (
        body(files=files_of(part((0, 2), (1, 3)))),
        "the parts of x overlap",
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_all_that_a_run_can_write_is_read(tmp_path, name):
    assert words_of(tmp_path, GOOD[name]) == ""


@pytest.mark.parametrize("name", BAD)
def test_a_manifest_that_no_run_writes_is_refused_by_name_and_value(tmp_path, name):
    content, words = BAD[name]
    assert words in words_of(tmp_path, content)


def test_a_manifest_is_that_of_its_directory(tmp_path):
    for name, step in (("step-00000001", 1), ("elsewhere", 2), ("step-00000003", 2)):
        (tmp_path / name).mkdir()
        words = words_of(tmp_path / name, body(step=step))
        assert words == ("it is that of step 2, not of step-00000003" if name[-1] == "3" else "")


def test_a_manifest_that_nests_without_end_is_refused(tmp_path):
    deep = '{"a":' * 100_000
    assert words_of(tmp_path, deep) == "it nests too deeply"


def test_only_another_hash_is_an_alteration(tmp_path):
    sign(tmp_path, body())
    place = tmp_path / MANIFEST
    place.write_text(place.read_text().replace("format", "fornat"))
    with pytest.raises(AlteredError, match="does not match its hash"):
        read_manifest(tmp_path)
    place.unlink()
    with pytest.raises(ValueError, match="is incomplete") as caught:
        read_manifest(tmp_path)
    assert not isinstance(caught.value, AlteredError)


def test_no_manifest_is_written_that_could_not_be_read(tmp_path, monkeypatch):
    write_manifest(tmp_path, 1, {}, {})
    size = (tmp_path / MANIFEST).stat().st_size
    for most in (size, size - 1):
        (tmp_path / MANIFEST).unlink(missing_ok=True)
        monkeypatch.setattr(module, "_MOST_BYTES", most)
        if most == size:
            write_manifest(tmp_path, 1, {}, {})
            assert read_manifest(tmp_path).step == 1
            continue
        with pytest.raises(ValueError, match=f"would have {size} bytes, which is too many"):
            write_manifest(tmp_path, 1, {}, {})
        assert not (tmp_path / MANIFEST).exists()


def test_a_file_is_what_its_entry_says_byte_by_byte_and_tensor_by_tensor(tmp_path):
    path, values = tmp_path / file_name(0), torch.arange(6.0).view(2, 3)
    write_tensors(path, [Described("x", (2, 3), torch.float32)], [values])
    split = TensorSlice(0, 5, ((1, 2), (4, 5)))
    for tensors in (
        {"x": StoredTensor("float32", (2, 3))},
        {"x": StoredTensor("float32", (5, 3), split)},
    ):
        check_file(path, stored_file(path, tensors))
    for tensors in (
        {},
        {"x": StoredTensor("float32", (2, 3)), "y": StoredTensor("float32", ())},
        {"x": StoredTensor("float32", (3, 2))},
        {"x": StoredTensor("float64", (2, 3))},
        {"x": StoredTensor("float32", (2, 5), TensorSlice(1, 5, ((0, 2),)))},
    ):
        with pytest.raises(ValueError, match="but its manifest says") as caught:
            check_file(path, stored_file(path, tensors))
        assert not isinstance(caught.value, AlteredError)
    good = stored_file(path, {"x": StoredTensor("float32", (2, 3))})
    content = path.read_bytes()
    for bad, words in (
        (content[:-1], f"{len(content) - 1} bytes, but {len(content)} were saved"),
        (content + b"x", f"{len(content) + 1} bytes, but {len(content)} were saved"),
        (content[:-1] + b"x", "does not match its hash"),
    ):
        path.write_bytes(bad)
        with pytest.raises(AlteredError, match=words):
            check_file(path, good)
    path.unlink()
    with pytest.raises(ValueError, match="is incomplete") as caught:
        check_file(path, good)
    assert not isinstance(caught.value, AlteredError)
