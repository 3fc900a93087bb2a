#!/usr/bin/env python3
"""Compile the GPU kernels for named cards, on a machine without one, and print what they take.

    python tools/compile_kernels.py [--targets sm_80 sm_90 sm_100 gfx942]

Registers a thread (at most 64, or fewer programs share a processor), bytes spilled to local memory (must be 0) and the
bits of one load or store of a matrix (128 is what the memory likes best). Needs triton, whose wheel carries CUDA's
assembler; for AMD (gfx942) also a linker, ld.lld, to which TRITON_HIP_LLD_PATH leads.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from coupled_adam.optim.backends import gpu, gpu_kernels
from coupled_adam.optim.directions import DIRECTION

TARGETS = ("sm_80", "sm_90", "sm_100")
WIDTHS = (768, 1024, 4096)
MATRICES = ("param", "grad", "exp_avg", "exp_avg_sq")
MANY = ("parameters", "grads", "exp_avgs", "exp_avg_sqs")
ASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Variant:
    """A kernel with types of its arguments; those that are left out are None."""

    label: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]


def variants() -> Iterator[Variant]:
    """Yield what a training run launches, and each part that can be switched on."""
    numbers = dict.fromkeys(
        ("first_rate", "second_rate", "coupling_factor", "first_scale", "root_scale", "eps", "decay"), "fp32"
    )
    clipped = {"grad_factor": "*fp32", "lr": "*fp32"}
    matrix = {"param": "*fp32", "exp_avg": "*fp32", "grad": "*fp32", "rows": "i32", "columns": "i32", "period": "i32"}
    moves = matrix | numbers | clipped
    coupled, elementwise = {"root": "*fp32"}, {"exp_avg_sq": "*fp32"}
    spectral = {"column": "*fp32", "row": "*fp32"}
    sums = {"grad": "*fp32", "total": "*fp32", "rows": "i32", "columns": "i32", "grad_factor": "fp32"}
    sums |= {"first_rate": "fp32", "coupling_factor": "fp32"}
    yield Variant("column sums", "sum_rows", sums, {})
    yield Variant("column sums, bfloat16 gradient", "sum_rows", sums | {"grad": "*bf16"}, {})
    yield Variant("column sums with κ", "sum_rows", sums | {"exp_avg": "*fp32", "grad_factor": "*fp32"}, {})
    for direction in DIRECTION:
        yield Variant(f"rows, {direction}", "move_matrix", moves | coupled, {"toward": direction})
    tempered = coupled | {"factors": "*fp32"}
    yield Variant("rows, tempered", "move_matrix", moves | tempered, {"toward": "ratio"})
    narrow = coupled | {"exp_avg": "*bf16", "seed": "i32"}
    yield Variant("rows, bfloat16 moment", "move_matrix", moves | narrow, {"toward": "ratio"})
    narrow = coupled | {"exp_avg": "*i8", "scales": "*fp32", "seed": "i32"}
    yield Variant("rows, moment in eight bits", "move_matrix", moves | narrow, {"toward": "ratio"})
    narrow = coupled | {"param": "*bf16", "grad": "*bf16"}
    yield Variant("rows, bfloat16 parameter", "move_matrix", moves | narrow, {"toward": "ratio"})
    halted = elementwise | spectral | {"halt": "*fp32"}
    yield Variant("matrix, atan2, spectral decay", "move_matrix", moves | elementwise | spectral, {"toward": "atan2"})
    yield Variant("the same under GradScaler", "move_matrix", moves | halted, {"toward": "atan2"})
    many = dict.fromkeys(MANY, "*fp32") | {"sizes": "i64"} | numbers | clipped
    scales = {"first_scale": "*fp64", "root_scale": "*fp64", "halt": "*fp32"}
    for direction in DIRECTION:
        yield Variant(f"many tensors, {direction}", "move_many", many, {"toward": direction, "SCALES": False})
    yield Variant("the same, steps on the device", "move_many", many | scales, {"toward": "atan2", "SCALES": True})


def elements(variant: Variant) -> int:
    """Return how many elements a program takes at once."""
    simple = variant.kernel == "sum_rows" and "exp_avg" not in variant.types
    return gpu.SUMMED if simple else gpu.MOVED


def source(variant: Variant, columns: int) -> ASTSource:
    """Describe a kernel as a launch for rows of this length does, every tensor at a multiple of 16 bytes."""
    function = getattr(gpu_kernels, variant.kernel)
    width, tile = gpu.tile_of(columns, elements(variant))
    constants = {"ROWS": max(gpu.ROWS, tile), "TILE": tile, "WIDTH": width, "BLOCK": gpu.MOVED}
    constants |= {"MANY": gpu_kernels.MANY, "EVEN": True, **variant.constants}
    if "toward" in constants:
        constants["toward"] = gpu.form(DIRECTION[constants["toward"]].numbers)
    divisible = [["tt.divisibility", 16]]
    signature: dict[str, Any] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(function.arg_names):
        kind = variant.types.get(name)
        if kind is None:
            signature[name], fixed[(i,)] = "constexpr", constants.get(name)
        elif variant.kernel == "move_many" and name in (*MANY, "sizes"):
            signature[name] = (kind,) * gpu_kernels.MANY
            attributes |= {(i, k): divisible for k in range(gpu_kernels.MANY)}
        else:
            signature[name] = kind
            if kind.startswith("*") or (name == "columns" and columns % 16 == 0):
                attributes[(i,)] = divisible
    return ASTSource(function, signature, fixed, attributes)


@dataclass(frozen=True)
class Figures:
    """What a kernel takes."""

    registers: int
    spilled: int
    """Bytes of local memory."""
    bits: int
    """Of the loads and stores with which a thread reaches its elements of the matrices."""


def compiled(variant: Variant, columns: int, target: str) -> Figures:
    """Compile a kernel for a card and read what it takes from the machine code."""
    amd = target.startswith("gfx")
    card = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    kernel = triton.compile(source(variant, columns), target=card, options={"num_warps": 4, "enable_fp_fusion": False})
    if amd:
        text = kernel.asm["amdgcn"]
        found = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        accesses = [32 * int(n or 1) for n in re.findall(r"(?:global|buffer)_(?:load|store)_dword(?:x(\d))?", text)]
        return Figures(found["vgpr_count"], found["vgpr_spill_count"], _bits(variant, accesses, 256))
    registers, spilled = _resources(kernel.asm["cubin"])
    found = re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    return Figures(registers, spilled, _bits(variant, [int(n or 1) * int(bits) for n, bits in found], 128))


def _bits(variant: Variant, accesses: list[int], threads: int) -> int:
    """Return the width such that accesses of it or of more cover all that a thread reads and writes of the matrices."""
    size = {"*fp32": 32, "*bf16": 16}
    param, grad, exp_avg, exp_avg_sq = (
        size.get(variant.types.get(one) or variant.types.get(many, ""), 0)
        for one, many in zip(MATRICES, MANY, strict=True)
    )
    read = param + exp_avg + exp_avg_sq + grad
    written = 0 if variant.kernel == "sum_rows" else read - grad
    needed = elements(variant) // threads * (read + written)
    return next(bits for bits in (128, 64, 32, 16, 0) if sum(x for x in accesses if x >= bits) >= needed)


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [ASSEMBLER / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]) + int(found[3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="cards (default: %(default)s)")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="lengths of a row (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}; registers a thread, the most of H = {', '.join(map(str, arguments.widths))}\n")
    print(f"| kernel | {' | '.join(arguments.targets)} | spilled | bits |")
    print(f"| --- |{' ---: |' * (len(arguments.targets) + 2)}")
    for variant in variants():
        found = [[compiled(variant, width, target) for width in arguments.widths] for target in arguments.targets]
        every = [figures for row in found for figures in row]
        registers = " | ".join(str(max(figures.registers for figures in row)) for row in found)
        spilled, bits = max(figures.spilled for figures in every), min(figures.bits for figures in every)
        print(f"| {variant.label} | {registers} | {spilled} | {bits} |", flush=True)


if __name__ == "__main__":
    main()
