"""The tests' way into native internals (tests/native): what it refuses, and what it keeps alive."""

import gc
import weakref
from pathlib import Path

import internals
import pytest
import torch

pytestmark = pytest.mark.cpu_only


def test_a_tensor_of_another_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match="got a tensor of torch.int64, expected torch.int32"):
        internals.RowsProblem(offsets=torch.zeros(3, dtype=torch.int64))
    internals.RowsProblem(offsets=torch.zeros(3, dtype=torch.int32))


def test_a_field_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="HeadRows has no field heads"):
        internals.HeadRows(heads=1)


def test_a_structure_keeps_its_tensors() -> None:
    tensor = torch.zeros(8)
    alive = weakref.ref(tensor)
    problem = internals.RowsProblem(a=internals.Rows(data=tensor, stride=4))
    del tensor
    gc.collect()
    assert alive() is not None
    del problem
    gc.collect()
    assert alive() is None


def test_a_file_that_is_no_library_is_named() -> None:
    with pytest.raises(RuntimeError, match="no_such_library.so"):
        internals.load_library(str(Path("no_such_library.so").resolve()))
