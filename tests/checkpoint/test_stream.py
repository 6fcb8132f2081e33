"""Files written tensor by tensor are valid safetensors files.  What does not fit is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vp_train.checkpoint.stream import Described, describe_tensors, read_tensor, write_tensors

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def described(tensors):
    return [Described(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_what_the_library_and_we_read(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 5), "vector": (7,), "number": (), "nothing": (0, 4), "one": (1,)}
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    path = tmp_path / "a.safetensors"
    write_tensors(path, described(tensors), iter(tensors.values()))
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for read in (found[name], read_tensor(path, name)):
            assert read.shape == tensor.shape
            assert read.dtype is dtype
            assert torch.equal(read, tensor)
    assert dict(describe_tensors(path)) == {entry.name: entry for entry in described(tensors)}
    assert [entry.num_bytes for entry in described(tensors)] == [
        count * dtype.itemsize for count in (15, 7, 1, 0, 1)
    ]


def test_a_view_is_written_in_its_own_order(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    views = {"turned": whole.T, "column": whole[:, 1], "part": whole[1:, 2:]}
    write_tensors(tmp_path / "a", described(views), views.values())
    for name, view in views.items():
        assert torch.equal(read_tensor(tmp_path / "a", name), view)


def test_data_begin_at_a_multiple_of_eight_bytes_whatever_the_names(tmp_path):
    beginnings = set()
    for length in range(1, 18):
        (tmp_path / "a").unlink(missing_ok=True)
        write_tensors(
            tmp_path / "a",
            [Described("x" * length, (2,), torch.float64)],
            [torch.tensor([1.0, 2.0]).double()],
        )
        content = (tmp_path / "a").read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        assert begin % 8 == 0
        assert begin + 16 == len(content)
        header = json.loads(content[8:begin])
        assert header["x" * length] == {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}
        assert content[8:begin].rstrip(b" ").endswith(b"}")
        beginnings.add(begin)
    assert 2 <= len(beginnings) <= 4  # no more padding than needed


@pytest.mark.parametrize(
    ("dtype", "code"),
    [(torch.int64, "I64"), (torch.int32, "I32"), (torch.uint8, "U8"), (torch.bool, "BOOL")],
)
def test_a_tensor_that_holds_no_floating_point_numbers_is_refused_by_name(tmp_path, dtype, code):
    save_file({"weight": torch.ones(2), "position_ids": torch.ones(3, dtype=dtype)}, tmp_path / "a")
    with pytest.raises(
        ValueError, match=rf"position_ids in .*/a is {code}; F64, F32, F16, BF16 can be read"
    ):
        describe_tensors(tmp_path / "a")


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: b"", lambda content: b"\xff" * 64]
)
def test_a_file_that_is_not_whole_is_named(tmp_path, damage):
    save_file({"weight": torch.ones(2)}, tmp_path / "a")
    (tmp_path / "a").write_bytes(damage((tmp_path / "a").read_bytes()))
    with pytest.raises(ValueError, match=r"/a is not a whole safetensors file: "):
        describe_tensors(tmp_path / "a")
    with pytest.raises(ValueError, match=r"/missing is not there"):
        describe_tensors(tmp_path / "missing")


@pytest.mark.parametrize(
    "tensor", [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(2, 1)]
)
def test_a_tensor_that_is_not_as_described_is_not_written(tmp_path, tensor):
    with pytest.raises(AssertionError, match="weight"):
        write_tensors(tmp_path / "a", [Described("weight", (2,), torch.float32)], [tensor])


@pytest.mark.parametrize("count", [0, 2])
def test_as_many_tensors_are_written_as_are_described(tmp_path, count):
    with pytest.raises(ValueError, match=r"zip\(\)"):
        write_tensors(
            tmp_path / "a", [Described("weight", (2,), torch.float32)], [torch.ones(2)] * count
        )


def test_what_git_keeps_of_a_large_file_is_named_as_that(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=f"^{path} is a git-LFS pointer, .*; run git lfs pull"):
        describe_tensors(path)
