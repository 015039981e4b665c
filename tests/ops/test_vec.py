"""vec.h, on each instruction set: every 16-bit value through the conversions, exp against fp64 over its range."""

import math
from typing import Any

import internals
import pytest
import torch
from native import KERNELS, ROOT, compile_kernel, link, require_build
from torch import Tensor

from sail_ops import testing

ALL_16_BITS = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])


@pytest.fixture(scope="module", params=testing.cpu_isas())
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The functions of vec_calls.h, compiled for one instruction set."""
    require_build()
    folder = tmp_path_factory.mktemp(request.param)
    include = [f"-I{internals.SOURCES}", f"-I{ROOT / KERNELS}"]
    compile_kernel(internals.SOURCES / "vec_probe.cpp", request.param, folder / "probe.o", *include)
    link([folder / "probe.o"], folder / "probe.so")
    return internals.load_library(str(folder / "probe.so"))


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, or both NaN."""
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(integers) == b.view(integers)) | (a.isnan() & b.isnan())).all())


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]


@HALVES
def test_every_half_widens_as_in_torch(probe, dtype: torch.dtype) -> None:
    n, width = ALL_16_BITS.numel(), probe.width()
    whole, part, scalar = (torch.full((n,), math.nan) for _ in range(3))
    getattr(probe, f"widen_{short(dtype)}")(ALL_16_BITS, whole, part, scalar, n)
    want = ALL_16_BITS.view(dtype).float()
    assert same(whole, want) and same(scalar, want)
    first = torch.arange(n) % width < width - 1
    assert same(part[first], want[first]) and not part[~first].any()  # lanes past the end load as zero


@HALVES
def test_narrowing_rounds_as_in_torch(probe, dtype: torch.dtype) -> None:
    exact = ALL_16_BITS.view(dtype).float()
    finite = exact[exact.isfinite()].double().sort().values
    between = ((finite[1:] + finite[:-1]) / 2).float()  # ties
    values = torch.cat(
        [
            exact,
            between,
            torch.nextafter(between, torch.tensor(math.inf)),
            torch.nextafter(between, torch.tensor(-math.inf)),
            torch.tensor([65504.0, 65519.0, 65520.0, 65536.0, 3.4e38, -3.4e38, 1e-45, -1e-45, 1e-30]),
        ]
    )
    values = torch.cat([values, torch.zeros(-values.numel() % 16)])
    n = values.numel()
    whole, scalar = (torch.zeros(n, dtype=dtype) for _ in range(2))
    getattr(probe, f"narrow_{short(dtype)}")(values, whole, scalar, n)
    want = values.to(dtype)
    # the AVX-512 instruction takes subnormal floats for zero, which as bf16 they nearly are
    tiny = values.abs() < torch.finfo(torch.float32).tiny
    assert same(whole[~tiny], want[~tiny]) and same(scalar, want)
    assert ((whole[tiny].float() - values[tiny]).abs() < torch.finfo(torch.float32).tiny).all()


def test_exp(probe) -> None:
    x = torch.cat([torch.linspace(-87.3, 88.7, 1 << 20), torch.linspace(-1e-3, 1e-3, 1 << 12)])
    out = torch.empty_like(x)
    probe.exponential(x, out, x.numel())
    ref = x.double().exp()
    ulp = 2.0 ** (ref.log2().floor() - 23)
    # torch's own vector exp is within one
    assert ((out.double() - ref).abs() / ulp).max() < 1.5

    edges = torch.tensor(
        [0.0, -0.0, 88.8, 200, math.inf, -104.1, -1e30, -math.inf, math.nan, 1e-45, -1e-45] + 5 * [0.0]
    )
    out = torch.empty_like(edges)
    probe.exponential(edges, out, edges.numel())
    assert torch.equal(out.nan_to_num(nan=-1), edges.exp().nan_to_num(nan=-1))

    tail = torch.linspace(-104, -87.3, 4096)  # down to the subnormals: right, or zero
    out = torch.empty_like(tail)
    probe.exponential(tail, out, tail.numel())
    assert ((out.double() - tail.double().exp()).abs() <= torch.finfo(torch.float32).tiny).all()


def test_sum_and_short_vectors(probe) -> None:
    width = probe.width()
    x, total = torch.arange(1.0, width + 1), torch.zeros(1)
    probe.total(x, total)
    assert total.item() == width * (width + 1) / 2
    for n in range(width):
        out = torch.full((width,), -1.0)
        probe.copy_n(x, out, n)
        assert torch.equal(out[:n], x[:n]) and (out[n:] == -1).all()
