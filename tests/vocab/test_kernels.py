"""The kernels in C++ of a CPU in 16 bits."""

import errno
import os
import re
import shutil
import time
from functools import cache
from itertools import product
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch

from tests.vocab.kernels import COMPARISONS, compare_chunks
from vp_train.tensors import compiling, kernels, precision
from vp_train.tensors.compiling import build_directory, cpp_compiler, has_cpp_compiler
from vp_train.vocab import rows

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(not has_cpp_compiler(), reason="needs a C++ compiler")


@pytest.fixture
def called(monkeypatch):
    """Yield the names of the kernels that are called."""
    names, run = set(), kernels.run

    def note(name, dtype, *arguments):
        names.add(name)
        run(name, dtype, *arguments)

    monkeypatch.setattr(kernels, "run", note)
    return names


def test_the_kernels_of_rows_equal_float64(called):
    for compare, case in COMPARISONS:
        compare(case, CPU, **({"rounds": True} if compare is compare_chunks else {}))
    compare_chunks((64, 2_001), CPU, rounds=True)  # more than one thread
    terms = {"input_term", "input_term_rounded", "scale", "subtract_targets"}
    assert called == {"extend", "combine", *terms}


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_numbers_that_are_not_finite_end_as_those_of_torch(dtype, softcap):
    generator = torch.Generator().manual_seed(0)
    bad = (torch.nan, torch.inf, -torch.inf)
    logits = torch.randn(1 + 6 * len(bad), 134, generator=generator).to(dtype)
    for number, (place, value) in enumerate(product((0, 66, 67, 100, 130, 133), bad)):
        logits[1 + number, place] = value

    def lse(statistics):
        running = torch.empty(3, len(logits), dtype=statistics)
        for start, columns in ((0, 67), (67, 67)):
            part = logits[:, start : start + columns].contiguous()
            part = part.to(part.dtype if statistics is torch.float32 else statistics)
            out, reference = torch.empty_like(part), torch.empty_like(running[0])
            rows.extend(part, out, running, reference, None, start, softcap)
        return running[0] + running[1].log()

    ours, true = lse(torch.float32).double(), lse(torch.float64)
    assert torch.equal(ours.isfinite(), true.isfinite())
    assert 0 < true.isfinite().sum() < len(true)
    assert torch.allclose(ours[ours.isfinite()], true[true.isfinite()], atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_two_dtypes_equal_float64(called, dtype):
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (5, 67), (300, 130)):
        addend = torch.randn(shape, generator=generator).to(dtype)
        sums = torch.randn(shape, generator=generator)
        by_row = torch.rand(2, shape[0], generator=generator) + 0.5
        for keep, scale in ((None, None), (by_row[0], by_row[1]), (None, torch.tensor(0.25))):
            kept, factor = (1.0 if f is None else f.view(-1, 1).double() for f in (keep, scale))
            true, ours = sums.double() * kept + addend.double() * factor, sums.clone()
            precision.accumulate(ours, addend, keep, scale)
            assert torch.allclose(ours.double(), true, atol=1e-6)
        ours = sums.T.clone(memory_format=torch.contiguous_format)
        wide = torch.zeros(shape[0], shape[1] + 3, dtype=dtype)[:, : shape[1]].copy_(addend)
        precision.accumulate_transposed(ours, wide, torch.tensor(0.25))
        assert torch.allclose(ours, sums.T + addend.T.float() * 0.25, atol=1e-6)
        assert torch.equal(precision.widened(addend, torch.float32), addend.float())
        scaled = precision.widened(addend, torch.float32, by_row[0])
        assert torch.equal(scaled, addend.float() * by_row[0][:, None])
    assert called == {"accumulate", "accumulate_transposed"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_16_bits_is_read_and_rounded_as_torch_does(dtype):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    numbers = bits.view(dtype)[None]
    assert same(precision.widened(numbers, torch.float32, torch.ones(1)), numbers.float())
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(-(2**31), 2**31, (1, 2**16), dtype=torch.int64, generator=generator)
    near = numbers.float().view(torch.int32) + torch.tensor([[-1], [0], [1]])
    half = 1 << (15 if dtype is torch.bfloat16 else 12)  # ties
    for wide in (draws.to(torch.int32), near.int(), near.int() + half):
        values, rounded = wide.view(torch.float32), torch.empty(wide.shape, dtype=dtype)
        ones = torch.ones(len(values))
        kernels.run(
            *("scale_rounded", dtype, values, ones, None, None, 0.0, rounded), *values.shape
        )
        assert same(rounded, values.to(dtype))


def same(ours, true):
    """Return whether two tensors have the same values and signs, NaN in the same places."""
    equal = torch.equal(ours.nan_to_num(7, 8, 9), true.nan_to_num(7, 8, 9))
    signs = (ours.signbit() == true.signbit()) | true.isnan()
    return equal and bool(signs.all())


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Let a script compile into an empty TMPDIR, and return the file that it notes its calls in.

    It copies what the true compiler has made before.
    """
    kernels.run("scale_rounded", torch.bfloat16, *[None] * 4, 0.0, None, 0, 0)
    built = max(build_directory().glob("*.so"), key=lambda path: path.stat().st_mtime)
    shutil.copy(built, tmp_path / "built")
    calls, script = tmp_path / "calls", tmp_path / "c++"
    script.write_text(
        f'#!/bin/sh\necho >> {calls}\nsleep .1\nfor last; do :; done\ncp {tmp_path}/built "$last"\n'
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return calls


def test_threads_and_processes_build_once(compiler):
    child = os.fork()
    if not child:
        try:
            kernels._load("BFloat16")
            os._exit(0)
        finally:
            os._exit(1)
    threads = [Thread(target=kernels._load, args=("BFloat16",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert os.waitpid(child, 0)[1] == 0
    for thread in threads:
        thread.join()
    assert compiler.read_text() == "\n"
    kernels._load("Float16")
    assert compiler.read_text() == "\n\n"


def test_what_others_may_write_is_not_loaded(compiler, tmp_path):
    (tmp_path / f"vp_train_{os.getuid()}").mkdir()
    (tmp_path / f"vp_train_{os.getuid()}").chmod(0o777)
    for calls in ("\n", "\n\n"):  # nothing is kept
        kernels._load("BFloat16")
        assert compiler.read_text() == calls
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        f"vp_train_{os.getuid()}"
    }


@pytest.mark.usefixtures("compiler")
def test_without_a_compiler_that_works_one_line_names_it_and_torch_computes(monkeypatch, capsys):
    for name in ("_functions", "_are_built"):  # as in a new process
        monkeypatch.setattr(kernels, name, cache(getattr(kernels, name).__wrapped__))
    matrix = torch.ones(2, 3, dtype=torch.bfloat16)
    assert kernels.suits(matrix)
    kernels._functions.cache_clear()
    kernels._are_built.cache_clear()
    Path(cpp_compiler()).write_text("#!/bin/sh\nprintf 'a.cpp:1: error: \\033[1m' >&2\nexit 1\n")
    shutil.rmtree(build_directory())
    for _ in range(2):
        assert not kernels.suits(matrix)
    assert re.fullmatch(
        r"going on without compiling, more slowly: \S+c\+\+ cannot build kernels\.cpp: "
        r"a\.cpp:1: error: \?\[1m; mend CXX or TMPDIR\n",
        capsys.readouterr().err,
    )
    assert torch.equal(precision.widened(matrix, torch.float32, torch.ones(2)), matrix.float())


def test_without_a_temporary_directory_the_kernels_say_so(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", list)
    with pytest.raises(RuntimeError, match=r"kernels\.cpp: .*temporary directory.*TMPDIR"):
        kernels._load("BFloat16")


def test_only_matrices_are_taken():
    cube = torch.ones(2, 2, 6, dtype=torch.bfloat16)
    assert not kernels.suits(cube)
    with pytest.raises(AssertionError):
        kernels.run("accumulate", cube.dtype, cube.float(), cube, None, None, 1, 1, *cube.shape)


def test_where_files_cannot_be_locked_every_process_compiles_at_once(tmp_path, monkeypatch):
    def flock(file, kind):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("fcntl.flock", flock)
    with compiling.compile_one_first(), pytest.raises(OSError, match="of the body"):
        raise OSError("of the body")


def test_one_process_compiles_first_and_the_others_then_do_so_together(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    both_in = Barrier(2)
    order = []

    def work():
        with compiling.compile_one_first():
            order.append("other")
            both_in.wait(timeout=20)

    threads = [Thread(target=work) for _ in range(2)]
    with compiling.compile_one_first():
        for thread in threads:
            thread.start()
        time.sleep(0.15)
        order.append("first")
    for thread in threads:
        thread.join()
    assert order == ["first", "other", "other"]
    assert both_in.broken is False
