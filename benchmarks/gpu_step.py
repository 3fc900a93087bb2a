"""Time and memory of an optimizer step on a GPU, ours against its peers, alternately in one process.

    python benchmarks/gpu_step.py [--rounds 20] [--json FILE]

Peers are torch's fused and foreach AdamW, after clip_grad_norm_ where the step clips, and Coupled Adam as its authors
publish it: a second moment of the whole matrix, averaged over the vocabulary in every step, with foreach operations.
Ours and one peer take turns, now one first and now the other; times are those of CUDA events, ratios medians over
pairs. Beside them stands what the memory allows: bytes ÷ bandwidth. Without a card the program prints what a step
launches, moves and allocates, and nothing is timed.
"""

import gc
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gpu_counts
import harness
import torch
from gpu_counts import SETTINGS, Shapes, Step
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from coupled_adam.optim.backends import gpu

#: The work: a tied embedding with the rest of its model, and ever larger heads.
WORK: dict[str, Callable[[], Shapes]] = {
    "50,304 × 768": lambda: [(50_304, 768)],
    "GPT-2 124M, 148 tensors": gpu_counts.gpt2,
    "128,256 × 4,096": lambda: [(128_256, 4_096)],
    "131,072 × 8,192": lambda: [(131_072, 8_192)],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Published:
    """Coupled Adam with a full second moment, as its description has it: a foreach Adam, and an average over dim 0."""

    def __init__(self, params: list[nn.Parameter], clip: bool) -> None:
        self.params, self.clip, self.steps = params, clip, 0
        self.coupled = 1
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(p) for p in params] for _ in range(2))

    @torch.no_grad()
    def __call__(self) -> None:
        """θ ← θ − η·(m̂ / (√ν̂ + ε)), ν̂ of the first parameters averaged over their rows; decoupled decay first."""
        if self.clip:
            clip_grad_norm_(self.params, 1.0)
        self.steps += 1
        (beta1, beta2), lr = SETTINGS["betas"], SETTINGS["lr"]
        grads: list[Tensor] = [p.grad for p in self.params if p.grad is not None]
        decayed = [p for p in self.params[self.coupled :] if p.ndim > 1]
        if decayed:
            torch._foreach_mul_(decayed, 1 - lr * 0.1)
        torch._foreach_lerp_(self.exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(self.exp_avg_sqs, beta2)
        torch._foreach_addcmul_(self.exp_avg_sqs, grads, grads, 1 - beta2)
        means = [v.mean(0, keepdim=True).expand_as(v) for v in self.exp_avg_sqs[: self.coupled]]
        roots = torch._foreach_sqrt([*means, *self.exp_avg_sqs[self.coupled :]])
        torch._foreach_div_(roots, (1 - beta2**self.steps) ** 0.5)
        torch._foreach_add_(roots, SETTINGS["eps"])
        torch._foreach_addcdiv_(self.params, self.exp_avgs, roots, -lr / (1 - beta1**self.steps))


STEPS: dict[str, Callable[[list[nn.Parameter], bool], Step]] = {
    "ours": gpu_counts.ours,
    "ours, bfloat16 moment": lambda params, clip: gpu_counts.ours(params, clip, exp_avg_dtype=torch.bfloat16),
    "fused AdamW": lambda params, clip: gpu_counts.theirs(params, clip, fused=True),
    "foreach AdamW": lambda params, clip: gpu_counts.theirs(params, clip, foreach=True),
    "published Coupled Adam": Published,
}


@dataclass
class Measured:
    """What a step takes."""

    milliseconds: list[float]
    peak: int
    """Bytes that it allocates, at most, beside parameters, gradients and state."""


def with_numbers(shapes: Shapes, dtype: torch.dtype) -> list[nn.Parameter]:
    """Make parameters with gradients; the same for every peer."""
    generator = torch.Generator("cuda").manual_seed(0)
    params = []
    for shape in shapes:
        params.append(nn.Parameter(torch.randn(shape, device="cuda", generator=generator).mul_(0.02).to(dtype)))
        params[-1].grad = torch.randn(shape, device="cuda", generator=generator).mul_(1e-3).to(dtype)
    return params


def measure(shapes: Shapes, dtype: torch.dtype, clip: bool, rounds: int, peer: str) -> dict[str, Measured] | None:
    """Time ours and a peer in turn, each with parameters of its own; None if they do not fit into the card."""
    steps: dict[str, Step] = {}
    found = {"ours": Measured([], 0), peer: Measured([], 0)}
    gc.collect()
    torch.cuda.empty_cache()
    try:
        for name in found:
            steps[name] = STEPS[name](with_numbers(shapes, dtype), clip)
            for _ in range(3):  # compiles, makes the state
                steps[name]()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            steps[name]()
            torch.cuda.synchronize()
            found[name].peak = torch.cuda.max_memory_allocated() - before
        for name, times in harness.in_turn(steps, rounds, timed).items():
            found[name].milliseconds = times
    except torch.cuda.OutOfMemoryError:
        return None
    return found


def timed(step: Step) -> float:
    """Return the milliseconds between two CUDA events around a step, the host's part included where it is longer."""
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    began.record()
    step()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


def bandwidth() -> float:
    """Return the bytes a second that a copy within the card's memory reads and writes."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source)) / 1e3 for _ in range(20)]
    return 2 * 4 * source.numel() / statistics.median(seconds)


def least_bytes(shapes: Shapes, width: int) -> float:
    """Return what a step of ours has to move: 24 bytes an element of the embedding in float32, 28 of the rest."""
    first, *rest = (torch.Size(shape).numel() for shape in shapes)
    return first * (4 * width + 8) + sum(rest) * (3 * width + 16)


def rows(rounds: int, results: harness.Results) -> Iterator[str]:
    """Yield the lines of the table."""
    speed = bandwidth()
    yield f"a copy within the card moves {speed / 1e9:,.0f} GB/s\n"
    yield "| step | time | ours ÷ this | temporaries | bytes ÷ bandwidth |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for label, shapes in WORK.items():
        for dtype_name, dtype in DTYPES.items():
            for clip in (False, True):
                case = f"{label}, {dtype_name}{', clipped' if clip else ''}"
                roof = least_bytes(shapes(), dtype.itemsize) / speed * 1e3
                for i, peer in enumerate(name for name in STEPS if name != "ours"):
                    found = measure(shapes(), dtype, clip, rounds, peer)
                    if found is None:
                        yield f"| {case}: {peer} | does not fit beside ours | | | |"
                        continue
                    times = (measured.milliseconds for measured in found.values())
                    pairs = harness.Pairs(list(zip(*times, strict=True)))
                    ratio = pairs.ratio
                    peaks = {name: measured.peak for name, measured in found.items()}
                    results.add(f"{case}: {peer}", pairs.figures("ms") | {"peak_bytes": peaks, "roof": roof})
                    for name, measured in found.items():
                        time, peak = statistics.median(measured.milliseconds), measured.peak / 2**20
                        line = f"{roof:.3f} ms" if name == "ours" else ""
                        if name != "ours" or i == 0:
                            compared = "" if name == "ours" else f"{ratio:.2f}"
                            yield f"| {case}: {name} | {time:.3f} ms | {compared} | {peak:,.1f} MiB | {line} |"


def main() -> None:
    arguments = harness.parser(__doc__, rounds=20).parse_args()
    warnings.simplefilter("ignore")
    if not torch.cuda.is_available():
        print("No GPU here: nothing was timed. What a step launches, moves and allocates:\n")
        gpu_counts.report(arguments)
        return
    kernels = "with the kernels of ours" if gpu.INSTALLED else "without Triton, so without kernels of ours"
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}, {kernels}")
    with harness.results(arguments) as results:
        for line in rows(arguments.rounds, results):
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
