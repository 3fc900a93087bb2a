"""Time and memory of an optimizer step, ours against its peer, alternately in one process.

    python benchmarks/optimizer_step.py [--rounds 15] [--threads 2] [--only TEXT] [--json FILE]

Every round runs ours, theirs, theirs, ours; the figures are medians of the paired ratios, so a slow spell of the
machine hits both sides. "moves" are the bytes that a step reads and writes at least, in passes over tensors that no
cache holds; "of the bandwidth" is the share that this is of what a product in place moves in the same time, measured
around the same rounds.
Needs the extra `fast`; `adams-torch` for the comparison of Adams; `deepspeed`, which compiles itself, for CPUAdam.
"""

import ctypes
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Step
from torch import nn
from torch.nn.utils import clip_grad_norm_

from coupled_adam import Adams, CoupledAdam, param_groups
from coupled_adam.lm.config import Model
from coupled_adam.lm.model import LanguageModel

warnings.simplefilter("ignore")

EMBEDDINGS = ((50_304, 768), (49_152, 576), (128_256, 1_024))
#: The settings of the paper; the learning rate is so small that the parameters hardly move over the rounds.
SETTINGS = {"lr": 1e-6, "betas": (0.9, 0.95), "eps": 1e-8}
MAX_NORM = 1.0
GPT2 = Model(n_layers=12, n_heads=12, hidden_size=768)


@dataclass(frozen=True)
class Comparison:
    name: str
    make: Callable[[], tuple[Step, Step]]
    """Builds both sides anew and returns a step of ours and one of theirs."""
    target: float | None = None
    moves: tuple[float, float] | None = None
    """Bytes that a step of ours and one of theirs have to read and write."""


class Absent(Exception):
    """A peer that cannot be measured here, and why."""


#: Bytes that a step in float32 moves per element, by pass: docs/benchmarks.md has the table.
COUPLED, ADAMW, CLIP, NORM = 24, 28, 12, 4
BF16_MOMENT, EIGHT_BIT_MOMENT = 20, 18


def size(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def with_gradients(parameters: list[nn.Parameter], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).mul_(1e-3)
    return parameters


def embedding(shape: tuple[int, int]) -> nn.Parameter:
    (parameter,) = with_gradients([nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))])
    return parameter


def coupled(parameter: nn.Parameter, **settings: object) -> CoupledAdam:
    return CoupledAdam([{"params": [parameter], "second_moment": "vocabulary"}], **SETTINGS, **settings)


def one_matrix(shape: tuple[int, int], clip: bool = False, **flags: object) -> tuple[Step, Step]:
    ours, theirs = embedding(shape), embedding(shape)
    optimizer = coupled(ours, max_grad_norm=MAX_NORM if clip else None)
    peer = torch.optim.AdamW([theirs], weight_decay=0.0, **SETTINGS, **flags)
    return optimizer.step, clipped([theirs], peer) if clip else peer.step


def narrow(shape: tuple[int, int], exp_avg_dtype: object) -> tuple[Step, Step]:
    """A clipped step with a narrower first moment, and one with float32."""
    ours, theirs = (coupled(embedding(shape), max_grad_norm=MAX_NORM, exp_avg_dtype=d) for d in (exp_avg_dtype, None))
    return ours.step, theirs.step


def centered(shape: tuple[int, int], clip: bool) -> tuple[Step, Step]:
    bound = MAX_NORM if clip else None
    ours, theirs = (coupled(embedding(shape), max_grad_norm=bound) for _ in range(2))
    ours.param_groups[0]["center"] = True
    return ours.step, theirs.step


def clipped(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Step:
    def step() -> None:
        clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()

    return step


def gpt2() -> LanguageModel:
    """The 124M parameters of the paper's smallest model: no biases, 50,304 tokens, tied embeddings."""
    model = LanguageModel(GPT2, 50_304, 1_024)
    with_gradients(list(model.parameters()))
    return model


def whole_gpt2(clip: bool, **flags: object) -> tuple[Step, Step]:
    ours, theirs = gpt2(), gpt2()
    optimizer = CoupledAdam(param_groups(ours), max_grad_norm=MAX_NORM if clip else None, **SETTINGS)
    peer = torch.optim.AdamW(param_groups(theirs), **SETTINGS, **flags)
    return optimizer.step, clipped(list(theirs.parameters()), peer) if clip else peer.step


def gpt2_moves(clip: bool) -> tuple[float, float]:
    matrix = size(EMBEDDINGS[0])
    with torch.device("meta"):
        every = sum(p.numel() for p in LanguageModel(GPT2, 50_304, 1_024).parameters())
    ours = COUPLED * matrix + (ADAMW + (NORM if clip else 0)) * (every - matrix)
    return ours, (ADAMW + (CLIP if clip else 0)) * every


def cpu_adam() -> tuple[Step, Step]:
    """DeepSpeed's AdamW for offloaded optimizers."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        theirs = embedding(EMBEDDINGS[0])
        peer = DeepSpeedCPUAdam([theirs], weight_decay=0.0, adamw_mode=True, **SETTINGS)
    except ImportError as reason:
        raise Absent(f"not installed ({reason})") from None
    except Exception as reason:  # whatever the compiler says
        raise Absent(f"cannot be compiled here ({str(reason).splitlines()[0]})") from None
    return coupled(embedding(EMBEDDINGS[0])).step, peer.step


def adams_gpt2() -> tuple[Step, Step]:
    try:
        from adams import Adams_ZeRO
    except ImportError as reason:
        raise Absent(f"not installed ({reason})") from None

    ours, theirs = gpt2(), gpt2()
    for model in (ours, theirs):
        model.token_embedding.weight.use_spectral_decay = False
    return Adams(ours.parameters(), lr=1e-6).step, Adams_ZeRO(theirs.parameters(), lr=1e-6).step


def comparisons() -> Iterator[Comparison]:
    fused, foreach = {"fused": True}, {"foreach": True}
    for i, (rows, width) in enumerate(EMBEDDINGS):
        shape, label = (rows, width), f"{rows:,} × {width:,}"
        first = i == 0
        plain = (COUPLED * size(shape), ADAMW * size(shape))
        clipped = (COUPLED * size(shape), (ADAMW + CLIP) * size(shape))
        same = (COUPLED * size(shape), COUPLED * size(shape))
        yield Comparison(
            f"coupled ÷ fused AdamW, {label}", lambda s=shape: one_matrix(s, **fused), 0.95 if first else None, plain
        )
        yield Comparison(f"coupled ÷ foreach AdamW, {label}", lambda s=shape: one_matrix(s, **foreach), None, plain)
        yield Comparison(
            f"clip + coupled ÷ clip + fused AdamW, {label}",
            lambda s=shape: one_matrix(s, clip=True, **fused),
            0.70 if first else None,
            clipped,
        )
        yield Comparison(
            f"coupled, centered ÷ coupled, {label}", lambda s=shape: centered(s, False), 1.10 if first else None, same
        )
        yield Comparison(
            f"clip + coupled, centered ÷ clip + coupled, {label}",
            lambda s=shape: centered(s, True),
            1.05 if first else None,
            same,
        )
    shape, label = EMBEDDINGS[0], f"{EMBEDDINGS[0][0]:,} × {EMBEDDINGS[0][1]:,}"
    yield Comparison(
        f"coupled ÷ DeepSpeed's CPUAdam, {label}", cpu_adam, 0.9, (COUPLED * size(shape), ADAMW * size(shape))
    )
    for moment, dtype, target, each in (
        ("bf16", torch.bfloat16, 1.0, BF16_MOMENT),
        ("8-bit", "8bit", 1.5, EIGHT_BIT_MOMENT),
    ):
        name = f"clip + coupled, {moment} first moment ÷ float32, {label}"
        moves = (each * size(shape), COUPLED * size(shape))
        yield Comparison(name, lambda d=dtype: narrow(EMBEDDINGS[0], d), target, moves)
    yield Comparison("GPT-2 124M: step ÷ fused AdamW", lambda: whole_gpt2(False, **fused), 0.95, gpt2_moves(False))
    yield Comparison(
        "GPT-2 124M: clip + step ÷ clip + fused AdamW", lambda: whole_gpt2(True, **fused), 0.85, gpt2_moves(True)
    )
    yield Comparison(
        "GPT-2 124M: clip + step ÷ clip + foreach AdamW", lambda: whole_gpt2(True, **foreach), None, gpt2_moves(True)
    )
    yield Comparison("GPT-2 124M: Adams ÷ adams-torch", adams_gpt2, 0.5)


def measure(comparison: Comparison, rounds: int) -> dict[str, Any]:
    """Return the figures of a comparison, with the bandwidth of memory around them."""
    try:
        ours, theirs = comparison.make()
    except Absent as reason:
        return {"absent": str(reason)}
    bandwidth = harness.Bandwidth()
    bandwidth.measure()
    found = harness.in_pairs(ours, theirs, rounds)
    bandwidth.measure()
    moves = {} if comparison.moves is None else {"moves": comparison.moves}
    return found.figures(target=comparison.target) | moves | bandwidth.figures()


def line_of(name: str, found: dict[str, Any]) -> str:
    if "absent" in found:
        return row(name, "", found["absent"], "", "", None)
    ours, theirs = found["ours"], found["theirs"]
    low, high = found["middle_half"]
    moves, shares = "", ""
    if "moves" in found:
        moves = " / ".join(f"{each / 1e6:,.0f} MB" for each in found["moves"])
        rates = (each / time for each, time in zip(found["moves"], (ours, theirs), strict=True))
        shares = " / ".join(f"{rate / found['bandwidth']['in_place']:.0%}" for rate in rates)
    times = (f"{1e3 * t:.1f} ms" for t in (ours, theirs))
    return row(name, *times, f"{found['ratio']:.2f}", f"{low:.2f}–{high:.2f}", found.get("target"), moves, shares)


def row(
    name: str, ours: str, theirs: str, ratio: str, spread: str, target: float | None, moves: str = "", shares: str = ""
) -> str:
    wanted = "" if target is None else f"≤ {target}"
    return f"| {name} | {ours} | {theirs} | {ratio} | {spread} | {wanted} | {moves} | {shares} |"


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    optimizer.step()
    return sum(x.numel() * x.element_size() for state in optimizer.state.values() for x in state.values())


def memory() -> Iterator[tuple[str, int, int, float | None]]:
    """Yield names, bytes of ours and of what they are compared with, and targets."""
    shape = EMBEDDINGS[0]
    theirs = state_bytes(torch.optim.AdamW([embedding(shape)], fused=True))
    forms = (("", None, 0.51), (", bf16 first moment", torch.bfloat16, 0.26), (", 8-bit first moment", "8bit", 0.13))
    for label, dtype, target in forms:
        ours = state_bytes(coupled(embedding(shape), exp_avg_dtype=dtype))
        yield f"state of a coupled matrix{label} ÷ AdamW", ours, theirs, target
    steps: tuple[tuple[str, dict[str, object], float | None], ...] = (
        ("coupled step", {}, 0.01),
        ("clipped coupled step", {"max_grad_norm": MAX_NORM}, 0.01),
        ("coupled step without numba", {"fused": False}, None),
    )
    for label, settings, bound in steps:
        parameter = embedding(shape)
        optimizer = coupled(parameter, **settings)
        optimizer.step()
        extra = max(peak_extra_bytes(optimizer.step) for _ in range(3))
        whole = parameter.numel() * parameter.element_size()
        yield f"peak extra memory of a {label} ÷ the matrix", extra, whole, bound


def peak_extra_bytes(step: Step) -> int:
    """How far the resident memory of this process rises above its level before the step (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed, and not given back, would be taken again unnoticed
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest level so far
    before = resident("VmRSS")
    step()
    return max(resident("VmHWM") - before, 0)


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = harness.parser(__doc__, rounds=15)
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--only", default="", help="comparisons whose name contains this text")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for what has an OpenMP of its own, as CPUAdam
    with harness.results(arguments) as results:
        about = harness.machine()
        versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "numba", "numpy"))
        machine = f"{about['processor']}, {about['cpus']} CPUs, {arguments.threads} threads"
        print(f"{machine}; Python {about['python']}, {versions}\n")
        print("| work | ours | theirs | ratio | middle half | target | moves | of the bandwidth |")
        print(f"| --- |{' ---: |' * 7}")
        for comparison in comparisons():
            if arguments.only in comparison.name:
                found = measure(comparison, arguments.rounds)
                results.add(comparison.name, found)
                print(line_of(comparison.name, found), flush=True)
                gc.collect()
        if not arguments.only:
            for name, ours, theirs, target in memory():
                figures = {"unit": "bytes", "ours": ours, "theirs": theirs, "ratio": ours / theirs, "target": target}
                results.add(name, figures)
                sizes = (f"{x / 2**20:.2f} MiB" for x in (ours, theirs))
                print(row(name, *sizes, f"{ours / theirs:.4f}", "", target), flush=True)


if __name__ == "__main__":
    main()
