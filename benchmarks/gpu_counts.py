"""What a step on a GPU launches, moves and allocates, counted on a machine without one.

    python benchmarks/gpu_counts.py [--json FILE]

Parameters are fake tensors that say they are on a GPU and hold nothing: a step that read a number from one would raise.
A torch operation counts as one launch; those of lists (`_foreach_…`, `_fused_…`, concatenation) as many as torch's
source packs them into. Views and allocations are none. Bytes are those of the arguments that an operation reads and of
those that it writes; temporaries the most that was alive at once beside parameters, gradients and state.
"""

import argparse
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import harness
import torch
from harness import Step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coupled_adam import Adams, CoupledAdam
from coupled_adam.optim.backends import gpu

Shapes = list[tuple[int, ...]]

MATRIX: Shapes = [(50_304, 768)]
SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}


def gpt2() -> Shapes:
    """List the 148 parameters of GPT-2 124M as transformers has them, the embedding first."""
    block = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,)]
    block += [(768, 3072), (3072,), (3072, 768), (768,)]
    return [(50_257, 768), (1024, 768), *block * 12, (768,), (768,)]


# ---------------------------------------------------------------------------------------------------- what is counted

#: A torch for CUDA asks the driver even for fake tensors. A torch for CPUs does not, nor one with a card.
USABLE = torch.cuda.is_available() or not torch.version.cuda


@dataclass
class Counts:
    """What was done, from ``counting``."""

    launches: int = 0
    large: int = 0
    """Launches that read or write more than a thousandth of the largest parameter."""
    moved: int = 0
    """Bytes."""
    peak: int = 0
    """Bytes of temporaries."""
    copies: list[str] = field(default_factory=list)
    """Copies between host and device, which may wait."""
    names: list[str] = field(default_factory=list)
    alive: int = 0


class Device(FakeTensorMode):
    """Makes tensors on accelerators fake, and leaves those of the CPU real: their numbers can be read, others not."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        devices = {x.device.type for x in leaves if isinstance(x, Tensor)}
        devices |= {x.type for x in leaves if isinstance(x, torch.device)}
        if devices <= {"cpu"} and not any(isinstance(x, FakeTensor) for x in leaves):
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten._fused_adamw_.tensor_lr:  # has no fake form, and does the same
            func, kwargs = torch.ops.aten._fused_adamw_.default, {**kwargs, "lr": 0.0}
        return super().__torch_dispatch__(func, types, args, kwargs)


class WithoutGuard(TorchFunctionMode):
    """Calls what ``copy_`` and slicing do, past their Python bindings, which ask for the driver of the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_:
            return torch.ops.aten.copy_(*args, **(kwargs or {}))
        if func is Tensor.__getitem__:
            dim = -1 if isinstance(args[1], tuple) else 0
            cut = args[1][1] if isinstance(args[1], tuple) else args[1]  # [..., a:b] and [a:b], all that a step has
            return torch.ops.aten.slice(args[0], dim, cut.start, cut.stop)
        return func(*args, **(kwargs or {}))


class Counter(TorchDispatchMode):
    """Counts the operations on fake tensors."""

    def __init__(self, counts: Counts, large: int) -> None:
        super().__init__()
        self.counts, self.large = counts, large

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = fakes((args, kwargs or {})), fakes(out)
        if func.namespace != "aten" or not (read or written):
            return out  # on the CPU, beside the device
        name = func._schema.name.removeprefix("aten::")
        if name in ("_to_copy", "copy_"):
            sources = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            if len({x.device.type for x in [*sources, *tree_leaves(out)] if isinstance(x, Tensor)}) > 1:
                self.counts.copies.append(name)
        storages = {id(x.untyped_storage()) for x in read}
        view = bool(written) and all(id(x.untyped_storage()) in storages for x in written) and not mutates(func)
        for x in written:
            if id(x.untyped_storage()) not in storages:
                self.allocated(x)
        if not view and not name.startswith(("empty", "new_empty", "detach", "_local_scalar")):
            changed = [x for x in written if id(x.untyped_storage()) not in storages] if written else []
            if mutates(func):
                changes = [a for a, s in zip(args, func._schema.arguments, strict=False) if written_to(s)]
                # The schema says that gradients may be written, which happens if a scale is given.
                changed = fakes(changes[:1] + changes[2:] if name.startswith("_fused_adam") else changes)
            self.launch(name, packed(name, args), read, changed)
        return out

    def launch(self, name: str, launches: int, read: list[Tensor], written: list[Tensor]) -> None:
        bytes_ = sum(x.numel() * x.element_size() for x in (*read, *written))
        self.counts.launches += launches
        self.counts.large += launches * (bytes_ > self.large)
        self.counts.moved += bytes_
        self.counts.names += [name] * launches

    def allocated(self, x: Tensor) -> None:
        counts, size = self.counts, x.numel() * x.element_size()
        counts.alive += size
        counts.peak = max(counts.peak, counts.alive)

        def freed() -> None:
            counts.alive -= size

        weakref.finalize(x.untyped_storage(), freed)


def fakes(tree: Any) -> list[Tensor]:
    """List the fake tensors of nested arguments."""
    return [x for x in tree_leaves(tree) if isinstance(x, FakeTensor)]


def written_to(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def mutates(func: Any) -> bool:
    return any(written_to(argument) for argument in func._schema.arguments)


#: Tensors, by how many lists go in, and blocks that one launch of torch's multi-tensor kernels takes, and the elements
#: of a block (ATen/native/cuda/MultiTensorApply.cuh); inputs of one launch that concatenates (Shape.cu).
MOST_TENSORS, MOST_BLOCKS, BLOCK, CONCATENATED = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65_536, 128


def packed(name: str, args: Any) -> int:
    """Return how many launches an operation makes."""
    lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
    if name in ("cat", "stack"):
        return -(-len(lists[0]) // CONCATENATED)
    if not name.startswith(("_foreach", "_fused")):
        return 1
    outputs = 1 if name.startswith("_foreach") and not name.endswith("_") and name != "_foreach_norm" else 0
    most = MOST_TENSORS[min(len(lists) + outputs, 5)]
    launches = tensors = blocks = 0
    for x in lists[0]:
        tensors += 1
        for _ in range(-(-x.numel() // BLOCK)):
            blocks += 1
            if blocks == MOST_BLOCKS:
                launches, tensors, blocks = launches + 1, 1, 0
        if tensors == most:
            launches, tensors, blocks = launches + 1, 0, 0
    # The norm has a second kernel, which adds up what the blocks have found.
    return launches + (blocks > 0) + (name == "_foreach_norm")


@contextmanager
def counting(largest: int = 0, *, triton: bool = True) -> Iterator[Counts]:
    """Count what is done to fake tensors here. Without ``triton`` as where it is not installed."""
    counts = Counts()
    counter = Counter(counts, largest // 1000)
    before = gpu.launch, gpu._address, gpu.DEVICES

    def launch(name: str, grid: Any, *arguments: Any, **constants: Any) -> None:
        read, written = kernel_bytes(name, arguments)
        counter.launch(name, 1, read, written)

    gpu.launch, gpu._address = launch, lambda x: x.storage_offset() * x.element_size()
    gpu.DEVICES = before[2] if triton else []
    gpu.PLAIN.append(FakeTensor)
    _foreach_supported_types.append(FakeTensor)
    try:
        with counter, WithoutGuard():
            yield counts
    finally:
        gpu.launch, gpu._address, gpu.DEVICES = before
        gpu.PLAIN.remove(FakeTensor)
        _foreach_supported_types.remove(FakeTensor)


def kernel_bytes(name: str, arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that a kernel of ours reads and writes."""
    function = getattr(gpu.kernels(), name)
    given = dict(zip(function.arg_names, arguments, strict=False))
    if name == "move_many":
        real = [size > 1 << 32 for size in given["sizes"]]  # the others fill up
        for key in ("parameters", "grads", "exp_avgs", "exp_avg_sqs"):
            given[key] = [x for x, there in zip(given[key], real, strict=True) if there]
    writes = {
        "sum_rows": ["total"],
        "root_of_rows": ["exp_avg_sq", "root"],
        "move_matrix": ["param", "exp_avg", "scales", "exp_avg_sq"],
        "move_many": ["parameters", "exp_avgs", "exp_avg_sqs"],
    }[name]
    only = {"total", "root"} if name in ("sum_rows", "root_of_rows") else set()
    return fakes([x for key, x in given.items() if key not in only]), fakes([given[key] for key in writes])


# ------------------------------------------------------------------------------------------------------ what is stepped


def parameters(shapes: Shapes, device: str = "cuda", dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.empty_like(p)
    return params


def groups(params: list[nn.Parameter], coupled: int = 1) -> list[dict[str, Any]]:
    """Sort parameters as ``param_groups`` does; the first is the embedding."""
    rest = params[coupled:]
    found = [
        {"params": params[:coupled], "second_moment": "vocabulary", "weight_decay": 0.0},
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]


def ours(params: list[nn.Parameter], clip: bool, **settings: Any) -> Step:
    return CoupledAdam(groups(params), max_grad_norm=1.0 if clip else None, **SETTINGS, **settings).step


def adams(params: list[nn.Parameter], clip: bool, **settings: Any) -> Step:
    return Adams(groups(params), max_grad_norm=1.0 if clip else None, **settings).step


def theirs(params: list[nn.Parameter], clip: bool, **flags: Any) -> Step:
    optimizer = torch.optim.AdamW(groups(params), **SETTINGS, **flags)

    def step() -> None:
        if clip:
            clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def counted(shapes: Shapes, make: Callable[..., Step], clip: bool, *, triton: bool = True, **settings: Any) -> Counts:
    """Count one step, not the first, of an optimizer on a GPU."""
    device = settings.pop("device", "cuda")
    with Device(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        params = parameters(shapes, device)
        step = make(params, clip, **settings)
        largest = 4 * max(p.numel() for p in params)
        with counting(largest, triton=triton):
            step()  # makes the state
        with counting(largest, triton=triton) as counts:
            step()
    return counts


def rows(results: harness.Results | None = None) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| step | launches | large launches | bytes per element | temporaries |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    kinds: list[tuple[str, Callable[..., Step], dict[str, Any]]] = [
        ("ours", ours, {}),
        ("ours, without Triton", ours, {"triton": False}),
        ("fused AdamW", theirs, {"fused": True}),
        ("foreach AdamW", theirs, {"foreach": True}),
    ]
    for label, shapes in (("50,304 × 768", MATRIX), ("GPT-2 124M, 148 tensors", gpt2())):
        for clip in (False, True):
            for name, make, settings in kinds:
                counts = counted(shapes, make, clip, **settings)
                if results is not None:
                    results.add(f"{label}{', clipped' if clip else ''}: {name}", asdict(counts))
                elements = sum(torch.Size(shape).numel() for shape in shapes)
                each, extra = counts.moved / elements, counts.peak / elements / 4
                yield (
                    f"| {label}{', clipped' if clip else ''}: {name} | {counts.launches} | {counts.large} | "
                    f"{each:.1f} | {extra:.2f} × the parameters |"
                )


def report(arguments: argparse.Namespace) -> None:
    """Print the table."""
    if not USABLE:
        print(f"nothing was counted: torch {torch.__version__} asks for the driver of a card; use a torch for CPUs")
        return
    print(f"torch {torch.__version__}; float32\n")
    with harness.results(arguments) as results:
        for line in rows(results):
            print(line, flush=True)


def main() -> None:
    report(harness.parser(__doc__).parse_args())


if __name__ == "__main__":
    sys.exit(main())
