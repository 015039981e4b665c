"""What nvcc made of the CUDA sources: the instructions that the kernels are written for, no stack, no spills."""

import os
import re
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import pytest
from native import BUILD, ROOT

from sail_ops import _library

PARTS = {"sm_80": ("HMMA", "LDGSTS", "LDSM"), "sm_90a": ("HGMMA", "UTMALDG", "SYNCS", "HMMA", "LDGSTS")}
needs_library = pytest.mark.skipif(not _library.CUDA_LIBRARY.exists(), reason="the CUDA library is not built")


def program(name: str) -> str:
    """cuobjdump and nvdisasm come with a CUDA toolkit, or from the package index (nvidia-cuda-cuobjdump)."""
    folders = [Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin", Path("/usr/local/cuda/bin")]
    found = shutil.which(name) or next((str(f / name) for f in folders if (f / name).exists()), None)
    if found is None:
        pytest.skip(f"no {name} here: pip install nvidia-cuda-{name}")
    return found


@cache
def read(*what: str) -> str:
    path = Path(program("nvdisasm")).parent  # cuobjdump looks for it
    command = [program("cuobjdump"), *what, str(_library.CUDA_LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": str(path)}).stdout


@cache
def kernels(arch: str) -> dict[str, str]:
    """Machine code of every kernel for one architecture, by mangled name."""
    parts = re.split(r"^\s*Function : (\S+)$", read("-arch", arch, "-sass"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@needs_library
@pytest.mark.parametrize("arch", PARTS)
def test_instructions(arch: str) -> None:
    code = kernels(arch)
    assert any("norm_kernel" in name for name in code)
    for instruction in PARTS[arch]:
        assert any(re.search(rf"\b{instruction}\b", text) for text in code.values()), instruction
    assert "sm90" not in " ".join(code) or arch == "sm_90a"


@needs_library
@pytest.mark.parametrize("arch", PARTS)
def test_products_are_the_tensor_cores(arch: str) -> None:
    """Every grouped GEMM and attention multiplies by mma, every one of namespace sm90 by wgmma of what TMA brings."""
    for name, text in kernels(arch).items():
        if not re.search(r"sail4cuda4sm\w+(rows|wgrad|attention_forward)_kernel", name):
            continue
        instructions = ("HGMMA", "UTMALDG") if "sail4cuda4sm90" in name else ("HMMA",)
        for instruction in instructions:
            assert re.search(rf"\b{instruction}\b", text), name


@needs_library
def test_pairs_of_blocks_share_by_multicast() -> None:
    """Every RowsProblem's kernel can; memory is fenced for the whole card at the cluster's two barriers alone, not at
    every arrival, and the other kernels know nothing of clusters."""
    for name, text in kernels("sm_90a").items():
        if not re.search(r"sail4cuda4sm90\w+(rows|wgrad|attention_forward)_kernel", name):
            continue
        found = {what: len(re.findall(what, text)) for what in (r"UTMALDG\.3D\.MULTICAST", "UCGABAR_WAIT")}
        if "rows_kernel" in name:
            assert all(found.values()) and text.count("MEMBAR.ALL.GPU") <= found["UCGABAR_WAIT"] == 2, name
        else:
            assert not any(found.values()), name


@needs_library
def test_softmax_runs_beside_a_product() -> None:
    """Between the wait for scores (one product may still run) and the wait for that product: ptxas may move either."""
    found = {n: t for n, t in kernels("sm_90a").items() if "sail4cuda4sm90" in n and "attention_forward_kernel" in n}
    assert len(found) == 8
    for name, text in found.items():
        beside = re.search(r"DEPBAR\.LE gsb0, 0x1 ;(.*?)DEPBAR\.LE gsb0, 0x0 ;", text, flags=re.S)
        assert beside, name
        assert beside[1].count("MUFU.EX2") >= 64 and "HGMMA" not in beside[1], name


@needs_library
def test_cutlass_is_wgmma_too() -> None:
    code = {name: text for name, text in kernels("sm_90a").items() if "7cutlass" in name}
    if not code and os.environ.get("SAIL_OPS_CUTLASS") != "ON":
        pytest.skip("a library without CUTLASS: SAIL_OPS_CUTLASS=ON builds it in")
    products = [text for name, text in code.items() if "device_kernel" in name]
    assert len(products) == 2  # bf16, fp16
    for text in products:
        for instruction in ("HGMMA", "UTMALDG", "UTMASTG", "SYNCS"):
            assert re.search(rf"\b{instruction}\b", text), instruction
    assert sum("describe_groups" in name for name in code) == 2


@needs_library
def test_no_stack_and_no_local_memory() -> None:
    usage = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", read("-res-usage"))
    assert len(usage) > 40
    assert [name for name, _, stack, local in usage if int(stack) or int(local)] == []


@needs_library
def test_shared_memory_that_no_launch_asks_for() -> None:
    """The sort's is dynamic up to 48 KB, less what its kernel has besides (sm_90a lists a KB more, the system's)."""
    text = (ROOT / "csrc" / "cuda" / "kernels" / "routing_metadata.cuh").read_text()
    dynamic = eval(re.search(r"kSortShared = ([\d *-]+);", text)[1])
    usage = read("-arch", "sm_80", "-res-usage")
    (own,) = re.findall(r"Function \S*sort_rows_kernel\S*:\s*REG:\d+ STACK:\d+ SHARED:(\d+)", usage)
    assert 0 < int(own) <= 48 * 1024 - dynamic


@needs_library
def test_float_atomics_nowhere() -> None:
    """Integers are counted by atomics; floats are added in a fixed order."""
    for arch in PARTS:
        for name, text in kernels(arch).items():
            atomics = re.findall(r"\b(?:RED|ATOM|ATOMG|ATOMS)\.\S+", text)
            assert not [a for a in atomics if re.search(r"F32|F16|F64|BF16", a)], name


@needs_library
def test_the_build_log_is_kept() -> None:
    logs = list(BUILD.rglob("*.cu.o.ptxas"))
    if not logs:
        pytest.skip("built elsewhere")
    text = "".join(path.read_text() for path in logs)
    assert "registers" in text and not re.search(r"Potential Performance Loss|[1-9]\d* bytes spill", text)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
@pytest.mark.parametrize("checked", [False, True], ids=["bare", "checked"])
def test_serialized_wgmma_fails_the_build(tmp_path: Path, checked: bool) -> None:
    """ptxas only remarks on it, so nvcc alone accepts it, whatever its flags."""
    flags = ["--generate-code=arch=compute_90a,code=[sm_90a]", "-Xptxas", "-v,--warn-on-spills,--warning-as-error"]
    out = tmp_path / "serialized.o"
    command = ["nvcc", "-O3", *flags, "-c", str(ROOT / "tests" / "support" / "serialized_wgmma.cu"), "-o", str(out)]
    launcher = [str(ROOT / "csrc" / "cuda" / "nvcc.sh")] if checked else []
    result = subprocess.run([*launcher, *command], capture_output=True, text=True)
    assert "wgmma.mma_async instructions are serialized" in result.stderr
    assert (result.returncode == 0) != checked and out.exists() != checked


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no CUDA headers here")
def test_a_tensor_map_that_the_driver_refuses_raises(tmp_path: Path) -> None:
    """It took the sm_80 kernels once, without a word; what TMA cannot read does so still, decided beforehand."""
    source, program = ROOT / "tests" / "support" / "tensor_map.cpp", tmp_path / "tensor_map"
    options = ["-x", "c++", "-std=c++20", "-cudart", "none", f"-I{ROOT / 'csrc' / 'cuda'}"]
    subprocess.run(["nvcc", *options, str(source), "-o", str(program)], check=True)
    first, refused = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    assert first == "0"
    assert refused == (
        "sail_ops: CUDA: the driver refused a tensor map: error 1, sizes [64, 5, 2], strides of [128, 640] bytes,"
        " box [64, 128, 1]; SAIL_OPS_CUDA_KERNELS=sm80 does without"
    )
