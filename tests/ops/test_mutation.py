"""Do the checks see a broken kernel? Each mutant changes one line of csrc/cpu/kernels and must fail its check.

A mutant is compiled for one instruction set only, so that one library, and one process, holds as many mutants of a
kernel as the machine has instruction sets.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from emulated import replace_once
from native import KERNELS, compile_as_built, copy_sources, link_with, require_build

from sail_ops import testing

pytestmark = pytest.mark.slow


HOST = "../"


class Mutant(NamedTuple):
    """In `file`, `old` becomes `new`; `source` is compiled again; `check` is of mutation_checks.py.

    A source above the kernels' folder is compiled once for all instruction sets.
    """

    check: str
    source: str
    file: str
    old: str
    new: str

    def isas(self) -> tuple[str, ...]:
        """That it may be compiled for."""
        if self.source.startswith(HOST):
            return ("",)
        # the attention check's shapes are over the rule in generic as it is: a mutant there would show nothing
        return testing.cpu_isas()[self.check == "attention" and len(testing.cpu_isas()) > 1 :]


MUTANTS = {
    "eps ignored": Mutant("rms_norm", "norm.cpp", "norm.cpp", " + static_cast<double>(eps)", ""),
    "last columns dropped": Mutant("rms_norm", "norm.cpp", "pairs.h", "if (c < n) body(c", "if (c < 0) body(c"),
    "no mean term in dx": Mutant("rms_norm", "norm.cpp", "norm.cpp", " - v * dot[i]", ""),
    "a row missing in dweight": Mutant(
        "rms_norm", "norm.cpp", "norm.cpp", "for (int i = 0; i < n; i++) term[i]", "for (int i = 1; i < n; i++) term[i]"
    ),
    "residual ignored": Mutant("add_rms_norm", "norm.cpp", "norm.cpp", " + load2(residual + c, lanes)", ""),
    "gradient of the sum ignored": Mutant("add_rms_norm", "norm.cpp", "norm.cpp", "if (add) d =", "if (!dx[0]) d ="),
    "gate and up swapped": Mutant(
        "swiglu",
        "activation.cpp",
        "activation.cpp",
        "g * sigmoid(g) * load2(u + c, lanes)",
        "g * sigmoid(load2(u + c, lanes)) * load2(u + c, lanes)",
    ),
    "derivative of sigmoid wrong": Mutant("swiglu", "activation.cpp", "activation.cpp", "g.b * (1.f - s.b)", "g.b"),
    "exp a thousandth off": Mutant("swiglu", "activation.cpp", "vec.h", "1.6666665459e-1f", "1.67e-1f"),
    "mean not taken off": Mutant("layer_norm", "norm.cpp", "norm.cpp", "(LAYER ? v - mean - d : v)", "v"),
    "rounding of the mean left in": Mutant(
        "layer_norm", "norm.cpp", "norm.cpp", "xv - mean[i] - rest[i]", "xv - mean[i]"
    ),
    "a wrong guess of the mean kept": Mutant(
        "layer_norm", "norm.cpp", "norm.cpp", "LAYER && 17 * rest * rest >", "LAYER && 1e9 * rest * rest <"
    ),
    "no mean of the gradient in dx": Mutant("layer_norm", "norm.cpp", "norm.cpp", "LAYER ? d - mean_wg[i] : d", "d"),
    "lanes past the end count as -mean": Mutant(
        "layer_norm", "norm.cpp", "norm.cpp", "i < s.n; i++) from_float(1", "i < 2 * W; i++) from_float(1"
    ),
    "bias's gradient of one row in four": Mutant(
        "layer_norm", "norm.cpp", "norm.cpp", "grads[i] = grads[i] + grads[i + n]", "grads[i] = grads[i]"
    ),
    "rotation the other way": Mutant(
        "rope", "rope.cpp", "rope.cpp", "x.low * a.cos.low - x.high", "x.low * a.cos.low + x.high"
    ),
    "gradient not rotated back": Mutant(
        "rope", "rope.cpp", "rope.cpp", "y.low * a.cos.low + y.high", "y.low * a.cos.low - y.high"
    ),
    "heads' weight missing in the dot product": Mutant(
        "qk_norm_rope", "rope.cpp", "rope.cpp", "fma(n.low * w.low, v.low", "fma(n.low, v.low"
    ),
    "only the last head in dweight": Mutant(
        "qk_norm_rope", "rope.cpp", "rope.cpp", "v.low * r, before.low)", "v.low * r, vf{})"
    ),
    "second half of a kept head is the first": Mutant(
        "qk_norm_rope", "rope.cpp", "rope.cpp", "v.columns[i], n.columns[i], c", "v.columns[i], n.columns[0], c"
    ),
    "positions ignored": Mutant(
        "rope_positions", HOST + "rope.cpp", HOST + "rope.cpp", "positions_ ? position(token) : 0", "token"
    ),
    "bias of a linear layer ignored": Mutant(
        "linear", HOST + "product.cpp", HOST + "product.cpp", "store(dtype, c, bias, t", "store(dtype, c, nullptr, t"
    ),
    "rows of a view of weights taken for contiguous": Mutant(
        "linear",
        HOST + "product.cpp",
        HOST + "product.cpp",
        "at(dtype, b, t.n0, 0), b.stride,",
        "at(dtype, b, t.n0, 0), K,",
    ),
    "a span of the softmax dropped": Mutant(
        "linear_cross_entropy", "loss.cpp", "loss.cpp", "int64_t r = 0; r < rows", "int64_t r = kSpan; r < rows"
    ),
    "sum not rescaled to the new maximum": Mutant(
        "linear_cross_entropy", "loss.cpp", "loss.cpp", "vexp(before - m), s)", "set1(1.f), s)"
    ),
    "label not taken off the gradient": Mutant(
        "linear_cross_entropy", HOST + "loss.cpp", HOST + "loss.cpp", " - values.scale[h.tokens[first + i]])", ")"
    ),
    "z-loss not differentiated": Mutant(
        "z_loss", HOST + "loss.cpp", HOST + "loss.cpp", "(1 + 2 * h.z_loss * lse)", "1"
    ),
    "only the last chunk in the head's gradient": Mutant(
        "linear_cross_entropy_chunks", HOST + "loss.cpp", HOST + "loss.cpp", "x, n, first > 0)", "x, n, false)"
    ),
    "only the last rows of a sum in hidden's gradient": Mutant(
        "linear_cross_entropy", HOST + "product.cpp", HOST + "product.cpp", "k0 ? Output::accumulate : Output", "Output"
    ),
    "what is there not added to in the head's gradient": Mutant(
        "linear_cross_entropy_chunks",
        HOST + "product.cpp",
        HOST + "product.cpp",
        "at(dtype, out, m * N), {m",
        "nullptr, {m",
    ),
    "ties to the higher id": Mutant(
        "route_topk", "routing.cpp", "routing.cpp", "best[i] > best[v]", "best[i] >= best[v]"
    ),
    "renormalization not differentiated": Mutant(
        "route_topk", "routing.cpp", "routing.cpp", "- dot) / total", ") / total"
    ),
    "gradient of prob_sum ignored": Mutant(
        "route_topk", "routing.cpp", "routing.cpp", "row.grad_prob_sum ? load", "!row.ids ? load"
    ),
    "routing weights ignored": Mutant(
        "fused_experts", "experts.cpp", "experts.cpp", "fma(v, set1(weight[k]), acc)", "acc + v"
    ),
    "an expert of each token dropped": Mutant(
        "fused_experts", "experts.cpp", "experts.cpp", "int64_t k = k0; k < K", "int64_t k = k0 + 1; k < K"
    ),
    "routing weights' gradient wrong": Mutant(
        "fused_experts", "experts.cpp", "experts.cpp", "fma(da, act * u, dot)", "fma(da, act, dot)"
    ),
    "up gets the gradient of gate": Mutant(
        "fused_experts", "experts.cpp", "experts.cpp", "u0 < lo ? vf{} : d * act", "u0 < lo ? vf{} : d * u * slope"
    ),
    "end of the dot product dropped": Mutant(
        "fused_experts", "gemm.cpp", "gemm_dot.h", "if (whole < K) {", "if (whole < 0) {"
    ),
    "columns past the last four dropped": Mutant(
        "fused_experts", "gemm.cpp", "gemm_dot.h", "for (; n < g.N; n++)", "for (; n < g.N - 3; n++)"
    ),
    "last k block dropped": Mutant(
        "fused_experts", "gemm.cpp", "gemm_outer.h", "k0 < g.K; k0 +=", "k0 < g.K - Op::K_STEP * kGroups; k0 +="
    ),
    "last rows of a weight's gradient dropped": Mutant(
        "fused_experts", "gemm.cpp", "gemm_wgrad.h", "? groups - g : kGroups, A", "? groups - g - 1 : kGroups, A"
    ),
    "routing weight missing in dh": Mutant(
        "fused_experts", "experts.cpp", "experts.cpp", "const vf d = da * weight;", "const vf d = da;"
    ),
    "last expert dropped": Mutant(
        "fused_experts",
        HOST + "moe_backward.cpp",
        HOST + "moe_backward.cpp",
        "e < l.E; e++)\n    for (int64_t n0",
        "e + 1 < l.E; e++)\n    for (int64_t n0",
    ),
    "weights of the wrong expert": Mutant(
        "fused_experts",
        HOST + "moe_forward.cpp",
        HOST + "moe_forward.cpp",
        "l.down + (t.e * l.D + t.n0)",
        "l.down + (t.e / 2 * l.D + t.n0)",
    ),
    "new maximum not applied": Mutant("attention", "attention.cpp", "attention_forward.h", "total *= shrink;", ""),
    "keys to come seen": Mutant(
        "attention", "attention.cpp", "attention_forward.h", "e = keep_first(e, visible - c, 0)", "e = e"
    ),
    "second block of keys read twice": Mutant(
        "attention", "attention.cpp", "attention_forward.h", "k0 += kBlock<T>, b++", "k0 += kBlock<T>, b = 1"
    ),
    "delta ignored": Mutant(
        "attention", "attention.cpp", "attention_backward.h", "(load(dp0 + c) - f0.delta)", "load(dp0 + c)"
    ),
    "gradient of lse ignored": Mutant(
        "attention", "attention.cpp", "attention_backward.h", "- f1.delta) + f1.dlse)", "- f1.delta))"
    ),
    "last row missing in dk and dv": Mutant(
        "attention", "attention.cpp", "attention_backward.h", "groups_of<T>(b.M) - g0", "groups_of<T>(b.M - 2) - g0"
    ),
    "second half of a wide head dropped": Mutant(
        "attention",
        "attention.cpp",
        "attention_tile.h",
        "n < D; n += kPanel, b += kGroups",
        "n < 64; n += kPanel, b += kGroups",
    ),
    "parts of the keys weighed alike": Mutant(
        "attention", "attention.cpp", "attention.cpp", "set1(vexp1(f.max[i * f.step] - most))", "set1(1)"
    ),
    "causal from the first key": Mutant(
        "attention", HOST + "attention.cpp", HOST + "attention.h", "i + 1 + s.nk - s.nq", "i + 1"
    ),
    "a part's last row blocks left out": Mutant(
        "attention",
        HOST + "attention_backward.cpp",
        HOST + "attention_backward.cpp",
        "i++ % p.parts == p.index",
        "i++ == p.index",
    ),
    "NaN below all": Mutant("route_nan", "routing.cpp", "routing.cpp", "vi{} + INT32_MAX", "vi{} + INT32_MIN"),
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each mutant's check said; under "none:..." what it said of the library as it is."""
    require_build()
    pending = dict(MUTANTS)
    found = {}
    while pending:
        batch = _next_batch(pending)
        found |= _run_batch(tmp_path_factory.mktemp("mutants"), batch)
    isa = testing.cpu_isas()[-1]
    for pair, said in _checks({f"{isa}:{m.check}" for m in MUTANTS.values()}, None).items():
        found[f"none:{pair.split(':')[1]}"] = said
    return found


def _next_batch(pending: dict[str, Mutant]) -> dict[str, tuple[str, Mutant]]:
    """Takes mutants for one library: no two share an instruction set and a source, or a check."""
    batch: dict[str, tuple[str, Mutant]] = {}
    taken: set[tuple[str, str]] = set()
    for name, mutant in list(pending.items()):
        for isa in mutant.isas():
            slots = {(isa, mutant.source), *((i, mutant.check) for i in ([isa] if isa else testing.cpu_isas()))}
            if not slots & taken:
                taken |= slots
                batch[name] = isa, pending.pop(name)
                break
    return batch


def _run_batch(folder: Path, batch: dict[str, tuple[str, Mutant]]) -> dict[str, str]:
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        compiled = threads.map(lambda i, b: _compile(folder / str(i), *b), range(len(batch)), batch.values())
        built = zip(batch.values(), compiled, strict=True)
        objects = {(Path(mutant.source).name, isa): path for (isa, mutant), path in built}
    link_with(objects, folder / "libsail_ops_cpu.so")
    pairs = {name: f"{isa or testing.cpu_isas()[-1]}:{m.check}" for name, (isa, m) in batch.items()}
    said = _checks(set(pairs.values()), folder)
    return {name: said[pair] for name, pair in pairs.items()}


def _compile(folder: Path, isa: str, mutant: Mutant) -> Path:
    replace_once(copy_sources(folder) / KERNELS / mutant.file, mutant.old, mutant.new)
    # -O1: compiling is nine tenths of this file's time; docs/decisions, tests-mutants-compiled-at-o1
    level = "-O3" if mutant.check == "attention" else "-O1"
    compile_as_built(folder / KERNELS / mutant.source, isa, folder / "mutant.o", level)
    return folder / "mutant.o"


def _checks(pairs: set[str], library: Path | None) -> dict[str, str]:
    environment = os.environ | ({"SAIL_OPS_LIBRARY_DIR": str(library)} if library else {})
    script = Path(__file__).parents[1] / "support" / "mutation_checks.py"
    command = [sys.executable, str(script), *sorted(pairs)]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(failures: dict[str, str], name: str) -> None:
    assert failures[name]


@pytest.mark.parametrize("check", sorted({m.check for m in MUTANTS.values()}))
def test_checks_pass_on_the_library_as_it_is(failures: dict[str, str], check: str) -> None:
    assert not failures[f"none:{check}"]
