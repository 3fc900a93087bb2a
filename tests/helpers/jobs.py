"""What the processes of the distributed tests run. Gradients are made up, or those of a small tied language model."""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from paragraphs import paragraphs
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from coupled_adam import Adams, Adams_ZeRO, CoupledAdam, center_, param_groups
from coupled_adam.lm.config import Model
from coupled_adam.lm.model import LanguageModel
from coupled_adam.optim.backends import cpu, gpu, plain
from coupled_adam.optim.reductions import local

STEPS = 12
PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate()}
OPTIMIZERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "coupled": (CoupledAdam, {}),
    "clipped": (CoupledAdam, {"max_grad_norm": 0.5}),
    "factor": (CoupledAdam, {"coupling_factor": 0.1}),
    "tempered": (CoupledAdam, {"row_exponent": 0.5, "max_grad_norm": 0.5}),
    "clipped factor": (CoupledAdam, {"coupling_factor": 0.1, "max_grad_norm": 0.5, "maximize": True}),
    "clipped 8bit": (CoupledAdam, {"max_grad_norm": 0.5, "exp_avg_dtype": "8bit"}),
    "adams": (Adams, {}),
    "clipped adams": (Adams, {"max_grad_norm": 0.5}),
}

# ------------------------------------------------------------------ made-up gradients


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    return {"embedding": (vocabulary, 5), "matrix": (6, 5), "batch": (3, 4, 5), "vector": (5,), "scalar": ()}


def values(vocabulary: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes(vocabulary).items()}


def build(params: dict[str, Tensor], optimizer: str) -> Any:
    cls, options = OPTIMIZERS[optimizer]
    rest = [(name, p) for name, p in params.items() if name != "embedding"]
    groups = [{"params": [("embedding", params["embedding"])], "second_moment": "vocabulary"}, {"params": rest}]
    return cls(groups, lr=1e-2, weight_decay=0.1, **options)


def spreader(layout: tuple[str, ...]) -> Callable[[Tensor], Tensor]:
    """Spreads a tensor over a mesh of as many dimensions as ``layout``; none leaves it as it is."""
    if not layout:
        return lambda x: x
    mesh = init_device_mesh("cpu", {1: (dist.get_world_size(),), 2: (2, 2)}[len(layout)])
    cuts = [PLACEMENTS[name] for name in layout]

    def spread(x: Tensor) -> Tensor:
        fits = [p if not p.is_shard() or p.dim < x.ndim else Replicate() for p in cuts]
        return distribute_tensor(x, mesh, fits, src_data_rank=None)

    return spread


def made_up(
    optimizer: str, vocabulary: int, layout: tuple[str, ...] = (), missing: bool = False, state: bool = False
) -> dict[str, Tensor]:
    """Parameters after the steps: plain tensors without ``layout``, else spread over a mesh of as many dimensions."""
    spread = spreader(layout)
    plain = () if not layout else ("vector",)  # a mixture of both kinds
    params = {
        name: nn.Parameter(x if name in plain else spread(x).clone()) for name, x in values(vocabulary, 0).items()
    }
    opt = build(params, optimizer)
    for step in range(STEPS):
        grads = values(vocabulary, step + 1)
        for name, param in params.items():
            param.grad = grads[name].clone() if name in plain else spread(grads[name]).clone()
            if missing and name in ("embedding", "matrix") and step % 3:
                # Process 1 has no gradient of its part; in one process those rows are 0.
                absent = spread(torch.ones_like(grads[name]))
                if isinstance(absent, DTensor):
                    if dist.get_rank() == 1:
                        param.grad = None
                else:
                    first, last = rows_of_process_1(len(grads[name]))
                    param.grad[first:last] = 0
            if missing and step % 3 == 2 and name == "matrix":
                param.grad = None  # nowhere
        opt.step()
    tensors = dict(params)
    if state:
        for name, param in params.items():
            tensors |= {f"{name} {k}": v for k, v in opt.state[param].items()}
    return {n: (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone() for n, x in tensors.items()}


def rows_of_process_1(rows: int, processes: int = 3) -> tuple[int, int]:
    size = -(-rows // processes)
    return min(size, rows), min(2 * size, rows)


def collectives(optimizer: str, layout: tuple[str, ...], coupled: int = 2) -> dict[str, int]:
    """How often a step communicates, by operation; with several coupled matrices."""
    spread = spreader(layout)
    tables = [nn.Parameter(spread(torch.randn(9, 4))) for _ in range(coupled)]
    matrices = [nn.Parameter(spread(torch.randn(6, 4))) for _ in range(3)]
    cls, options = OPTIMIZERS[optimizer]
    opt = cls([{"params": tables, "second_moment": "vocabulary"}, {"params": matrices}], **options)
    counts: dict[str, int] = {}
    for _ in range(3):
        for p in (*tables, *matrices):
            p.grad = torch.ones_like(p)
        with CommDebugMode() as mode:
            opt.step()
        counts = {str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()}
    return counts


# ------------------------------------------------------------------ a language model

WIDTH, LENGTH, BATCH, VOCABULARY = 16, 16, 12, 257


def text() -> Tensor:
    return torch.tensor(list(paragraphs(100).encode()))


def language_model(dtype: torch.dtype) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(Model(n_layers=2, n_heads=2, hidden_size=WIDTH), VOCABULARY, LENGTH).to(dtype)


def batch(step: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """This process's part of the sequences of a step, one token longer than the model reads."""
    tokens, size = text(), BATCH // ranks
    starts = torch.randint(len(tokens) - LENGTH - 1, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([tokens[s : s + LENGTH + 1] for s in starts[rank * size : (rank + 1) * size]])


def wrap(model: LanguageModel, wrapping: str) -> tuple[nn.Module, int, int]:
    """The model in its wrapping, and which part of how many of the batch this process takes."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if wrapping else (0, 1)
    if wrapping == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), rank, ranks
    if wrapping in ("fsdp", "hsdp"):
        hybrid = wrapping == "hsdp"
        mesh = init_device_mesh(
            "cpu",
            (2, ranks // 2) if hybrid else (ranks,),
            mesh_dim_names=("replicate", "shard") if hybrid else ("shard",),
        )
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if wrapping in ("tp", "fsdp+tp"):
        mesh = init_device_mesh(
            "cpu", (1 if wrapping == "tp" else 2, ranks if wrapping == "tp" else 2), mesh_dim_names=("dp", "tp")
        )
        plan: dict[str, Any] = {
            "token_embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        }
        plan["head"] = ColwiseParallel(output_layouts=Replicate())
        for i in range(len(model.blocks)):
            plan[f"blocks.{i}.mlp.fc"] = ColwiseParallel()
            plan[f"blocks.{i}.mlp.proj"] = RowwiseParallel()
        parallelize_module(model, mesh["tp"], plan)
        model.head.weight = model.token_embedding.weight  # parallelize_module takes tied weights apart
        if wrapping == "fsdp+tp":
            for block in model.blocks:
                fully_shard(block, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
            return model, mesh["dp"].get_local_rank(), 2
        return model, 0, 1
    return model, rank, ranks


def train(
    optimizer: str, wrapping: str = "", dtype: torch.dtype = torch.float32, steps: int = STEPS, compiled: bool = False
) -> dict[str, Tensor]:
    """The language model's parameters after training, whole."""
    model, opt, rank, ranks = trainer(optimizer, wrapping, dtype)
    step = opt.step
    if compiled:
        steps = 10
        model.compile(backend="aot_eager")  # all of the compiler but its slow last stage
        step = torch.compile(opt.step, fullgraph=True, backend="aot_eager")
    for i in range(steps):
        one_step(model, opt, batch(i, rank, ranks), step)
    return whole(model)


def trainer(optimizer: str, wrapping: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any, int, int]:
    plain = language_model(dtype)
    plain.unused = nn.Parameter(torch.ones(3, 4, dtype=dtype))  # it never has a gradient
    model, rank, ranks = wrap(plain, wrapping)
    cls, options = OPTIMIZERS[optimizer]
    if wrapping == "zero":
        cls, options = Adams_ZeRO, {"master_dtype": dtype, **options}
    groups = param_groups(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = cls(groups, lr=1e-3, **options)
    return model, opt, rank, ranks


def one_step(model: nn.Module, optimizer: Any, tokens: Tensor, step: Any = None) -> None:
    optimizer.zero_grad()
    logits = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    (step or optimizer.step)()


def saved(directory: str, optimizer: str, wrapping: str, wait: bool = True) -> dict[str, Tensor]:
    """Train, save with torch.distributed.checkpoint, train on. What was saved, and where it went."""
    model, opt, rank, ranks = trainer(optimizer, wrapping)
    for step in range(4):
        one_step(model, opt, batch(step, rank, ranks))
    content = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
    if wait:
        checkpoint.save(content, checkpoint_id=directory)
    else:
        # Its thread communicates too: it needs a group of its own beside the training.
        writing = checkpoint.async_save(content, checkpoint_id=directory, process_group=dist.new_group())
    found = contents(model, opt)
    for step in range(4, 8):
        one_step(model, opt, batch(step, rank, ranks))  # while an asynchronous save goes on
    if not wait:
        writing.result()
    return found | {f"then {name}": x for name, x in whole(model).items()}


def loaded(directory: str, optimizer: str, wrapping: str) -> dict[str, Tensor]:
    """Load what :func:`saved` has written into a model and optimizer of another wrapping, and train on."""
    model, opt, rank, ranks = trainer(optimizer, wrapping)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    content = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
    checkpoint.load(content, checkpoint_id=directory)
    set_model_state_dict(model, content["model"])
    set_optimizer_state_dict(model, opt, content["optimizer"])
    found = contents(model, opt)
    for step in range(4, 8):
        one_step(model, opt, batch(step, rank, ranks))
    return found | {f"then {name}": x for name, x in whole(model).items()}


def zero(optimizer_dtype: torch.dtype) -> dict[str, Any]:
    """Adams_ZeRO on awkward shapes: other parameters in every process, missing gradients, a group that comes later."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    shapes = [(2, 7), (1,), (), (5, 3), (7, 4), (3, 2, 4)]
    params = [nn.Parameter(torch.randn(s, generator=generator).to(optimizer_dtype)) for s in shapes]
    buffer = torch.full((2,), float(rank))
    groups = [{"params": params[3:4], "second_moment": "vocabulary"}, {"params": params[:3]}]
    opt = Adams_ZeRO(groups, lr=1e-2, max_grad_norm=1.0)
    opt.add_param_group({"params": params[4:]})
    opt.broadcast_buffers([buffer])
    first, grads = [p.detach().clone() for p in params], []
    for step in range(6):
        for i, p in enumerate(params):
            absent = (i == 4 and rank == 1) or (i == 5 and step % 2) or (i == 0 and step == 3)
            p.grad = None if absent else torch.randn(p.shape, generator=generator).to(p.dtype)
        grads.append([None if p.grad is None else p.grad.clone() for p in params])
        if step == 3:
            with tempfile.TemporaryDirectory() as directory:  # each process its own file
                torch.save(opt.state_dict(), f"{directory}/state.pt")
                saved = torch.load(f"{directory}/state.pt", weights_only=True)
            fresh = Adams_ZeRO(
                [{k: v for k, v in g.items() if k in ("params", "second_moment")} for g in opt.param_groups],
                max_grad_norm=1.0,
            )
            with torch.no_grad():
                for p in params:
                    p.zero_()
            fresh.load_state_dict(saved)
            opt = fresh
        before = [g if g is None else g.clone() for g in grads[-1]]
        opt.step()
        for p, g in zip(params, before, strict=True):
            assert (p.grad is None) == (g is None) and (g is None or torch.equal(p.grad, g))
    masters = [opt.state[p]["master"] for p in params]
    local = sum(x.to_local().numel() for p in params for k, x in opt.state[p].items() if k == "exp_avg")
    return {
        "first": first,
        "grads": grads,
        "params": [p.detach() for p in params],
        "masters": [m.full_tensor() for m in masters],
        "buffer": buffer,
        "moments held": local,
        "moments": sum(p.numel() for p in params),
        "ranks": ranks,
    }


def contents(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Parameters and state, whole. Every parameter has state, with a gradient or not."""
    found = whole(model)
    for name, param in model.named_parameters():
        for key, x in optimizer.state[param].items():
            full = x.full_tensor() if isinstance(x, DTensor) else x
            found[f"{name.removeprefix('module.')} {key}"] = full.detach().clone()
    return found


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


# ------------------------------------------------------------------ vocabulary shards that are plain tensors


def vocabulary_shards(
    optimizer: str, rows: list[int], alone: bool = False, start: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """As :func:`made_up`, each process holding so many rows of the embedding as a plain tensor; or one all of them."""
    rank = 0 if alone else dist.get_rank()
    mine = slice(0, sum(rows)) if alone else slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    params = {name: nn.Parameter(x[mine] if name == "embedding" else x) for name, x in values(sum(rows), 0).items()}
    if not alone:
        params["embedding"].vocabulary_group = dist.group.WORLD
    opt = build(params, optimizer)
    if start is not None:
        key = start["param_groups"][0]["params"][0]
        part = {k: x[mine] if x.ndim else x for k, x in start["state"][key].items()}
        opt.load_state_dict({**start, "state": {**start["state"], key: part}})
    for step in range(STEPS):
        grads = values(sum(rows), step + 1)
        for name, param in params.items():
            param.grad = grads[name][mine].clone() if name == "embedding" else grads[name]
        if step % 4 == 3 and alone:  # the first process has no gradient, and its rows count as 0
            params["embedding"].grad[: rows[0]] = 0
        elif step % 4 == 3 and rank == 0:
            params["embedding"].grad = None
        opt.step()
    found = {name: p.detach() for name, p in params.items()} | {
        "norm": opt.grad_norm if opt.grad_norm is not None else 0
    }
    return found | {f"embedding {k}": x for k, x in opt.state[params["embedding"]].items()}


# ------------------------------------------------------------------ centering


@contextlib.contextmanager
def measured() -> Iterator[list[int]]:
    """Notes every pass that only measures, by any backend."""
    passes: list[int] = []
    with contextlib.ExitStack() as stack:
        for backend in (cpu, plain):
            noted = stack.enter_context(patch.object(backend, "measure", side_effect=backend.measure))
            noted.side_effect = lambda job, real=noted.side_effect: (passes.append(1), real(job))[1]
        yield passes


def centered_steps(
    optimizer: str, vocabulary: int, layout: tuple[str, ...] = (), coupled: bool = True
) -> dict[str, Any]:
    """A centered matrix after the steps, its largest mean after any, and what every step has sent and measured."""
    spread = spreader(layout)
    cls, options = OPTIMIZERS[optimizer]
    param = nn.Parameter(spread(values(vocabulary, 0)["embedding"]).clone())
    moment = "vocabulary" if coupled else "elementwise"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is coupled
        opt = cls([{"params": [param], "second_moment": moment, "center": True}], lr=1e-2, weight_decay=0.1, **options)
    sent, means = [], []
    with measured() as passes:
        for step in range(STEPS):
            param.grad = spread(values(vocabulary, step + 1)["embedding"]).clone()
            with CommDebugMode() as mode:
                opt.step()
            sent.append({str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()})
            whole_now = param.full_tensor() if isinstance(param, DTensor) else param
            means.append(whole_now.detach().mean(0).abs().max().item())
    return {
        "param": whole_now.detach(),
        "means": max(means),
        "sent": sent,
        "passes": len(passes),
        "rows": len(local(param)),
    }


def centered_training(optimizer: str, wrapping: str = "") -> dict[str, Tensor]:
    """The tied language model's parameters after training with a centered embedding, and the passes that measured."""
    model, opt, rank, ranks = trainer(optimizer, wrapping, torch.float64 if "adams" in optimizer else torch.float32)
    opt.param_groups[0]["center"] = True
    with measured() as passes:
        for step in range(STEPS):
            one_step(model, opt, batch(step, rank, ranks))
    return whole(model) | {"passes": torch.tensor(len(passes))}


def centered_shards(rows: list[int], alone: bool = False) -> Tensor:
    """This process's rows of a centered matrix after the steps, with ``vocabulary_group``; or all of them."""
    rank = 0 if alone else dist.get_rank()
    mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    param = nn.Parameter(values(sum(rows), 0)["embedding"][mine].clone())
    if not alone:
        param.vocabulary_group = dist.group.WORLD
    opt = CoupledAdam([{"params": [param], "second_moment": "vocabulary", "center": True}], lr=1e-2, max_grad_norm=0.5)
    for step in range(STEPS):
        param.grad = values(sum(rows), step + 1)["embedding"][mine].clone()
        opt.step()
    return param.detach()


def centered_by_hand(rows: list[int], alone: bool = False) -> list[Tensor]:
    """A matrix that ``center_`` has centered: as DTensors over rows and over columns, and as a vocabulary shard."""
    whole_matrix = values(sum(rows), 0)["embedding"] + 3
    if alone:
        return [center_(whole_matrix)]
    spreads = [
        center_(nn.Parameter(spreader((cut,))(whole_matrix.clone()))).full_tensor().detach() for cut in PLACEMENTS
    ]
    first = sum(rows[: dist.get_rank()])
    shard = whole_matrix[first : first + rows[dist.get_rank()]].clone()
    shard.vocabulary_group = dist.group.WORLD
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, center_(shard).clone())  # without the group
    return [*spreads, torch.cat(parts)]


def adamw_checkpoint(vocabulary: int) -> dict[str, Any]:
    """What an AdamW of one process has saved after a step with the groups of :func:`build`."""
    params = {name: nn.Parameter(x) for name, x in values(vocabulary, 0).items()}
    for param, grad in zip(params.values(), values(vocabulary, 99).values(), strict=True):
        param.grad = grad
    named = list(params.items())
    opt = torch.optim.AdamW([{"params": named[:1]}, {"params": named[1:]}], lr=1e-2, weight_decay=0.1)
    opt.step()
    return opt.state_dict()


# ------------------------------------------------------------------ shards that GPU kernels take


class Uneven(nn.Module):
    """A tied language model whose shards over two processes are uneven, and some of them empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 6)
        self.gate = nn.Parameter(torch.ones(1, 6))  # coupled too: one process has no row of it
        self.inner = nn.Linear(6, 5)
        self.outer = nn.Linear(5, 6, bias=False)
        self.one = nn.Linear(6, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.gate
        x = x + self.outer(self.inner(x).tanh()) * self.one(x)
        return x @ self.embedding.weight.t()


def sharded(optimizer: str, ranks: int = 1) -> tuple[dict[str, Tensor], set[str]]:
    """What an optimizer makes of :class:`Uneven`, whole; on several ranks by Triton's kernels, whose names come too."""
    names, rank, model = set(), 0, Uneven()
    with contextlib.ExitStack() as stack:
        if ranks > 1:
            launch, rank = gpu.launch, dist.get_rank()
            fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
            stack.enter_context(patch.object(gpu, "DEVICES", ["cpu"]))
            noted = stack.enter_context(patch.object(gpu, "launch", side_effect=launch))
        params = dict(model.named_parameters())
        cls, options = OPTIMIZERS[optimizer]
        coupled = [params["embedding.weight"], params["gate"]]
        opt = cls(param_groups(model, coupled=coupled), lr=1e-2, **options)
        for step in range(4):
            tokens = torch.randint(7, (8, 5), generator=torch.Generator().manual_seed(step))
            one_step(model, opt, tokens[rank::ranks])
        if ranks > 1:
            names = {call.args[0] for call in noted.call_args_list}
    return contents(model, opt), names
