"""What would corrupt memory, hang, or go wrong in silence is an error that names the parameter and the remedy."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any

import one_step
import pytest
import torch
import torch.distributed as dist
from torch import nn

from coupled_adam import Adams, Adams_ZeRO, CoupledAdam, param_groups
from coupled_adam.optim.backends import cpu, gpu, plain, torch_adamw
from coupled_adam.optim.spectral import RankOne

KINDS = {
    "coupled": lambda p: CoupledAdam([{"params": [("table", p)], "second_moment": "vocabulary"}]),
    "clipped": lambda p: CoupledAdam([{"params": [("table", p)], "second_moment": "vocabulary"}], max_grad_norm=1.0),
    "bfloat16 moment": lambda p: CoupledAdam(
        [{"params": [("table", p)], "second_moment": "vocabulary"}], exp_avg_dtype=torch.bfloat16
    ),
    "moment coupling": lambda p: CoupledAdam([("table", p)], coupling_factor=0.1),
    "torch's fused AdamW": lambda p: quietly(CoupledAdam, [("table", p)]),
    "adams": lambda p: Adams([("table", p)]),
    "zero": lambda p: Adams_ZeRO([("table", p)]),
}


def quietly(cls: type, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(*args, **kwargs)


@pytest.mark.parametrize("shape", [(4000, 64), (20, 64), (50, 80), (50, 10)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_was_resized_is_refused_by_name(kind: str, shape: tuple[int, int], fused: bool | None) -> None:
    parameter = nn.Parameter(torch.randn(50, 64))
    optimizer = KINDS[kind](parameter)
    optimizer.param_groups[0]["fused"] = fused
    parameter.grad = torch.randn(50, 64)
    optimizer.step()
    parameter.data = torch.randn(shape)  # as resize_token_embeddings does it to a tied embedding
    before = parameter.detach().clone()
    parameter.grad = torch.randn(shape)
    with pytest.raises(
        RuntimeError, match=rf"'table' has shape \({shape[0]}, {shape[1]}\).*for \(50, 64\).*new optimizer"
    ):
        optimizer.step()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_from_before_the_resizing_is_refused(kind: str) -> None:
    parameter = nn.Parameter(torch.randn(50, 64))
    parameter.grad = torch.randn(50, 64)
    parameter.data = torch.randn(4000, 64)
    with pytest.raises(RuntimeError, match=r"gradient of parameter 'table' has shape \(50, 64\).*\(4000, 64\)"):
        KINDS[kind](parameter).step()


BACKENDS = pytest.mark.parametrize("backend", [cpu, gpu, plain], ids=lambda m: m.__name__.split(".")[-1])


@BACKENDS
@pytest.mark.parametrize("wrong", range(4))
def test_no_wrong_shape_reaches_a_kernel_whoever_calls_it(wrong: int, backend: Any) -> None:
    shapes = [(50, 64)] * 4
    shapes[wrong] = (4000, 64)
    for shared in (False, True):
        if shared and wrong == 3:
            shapes[3] = (1, 65)
        elif shared:
            shapes[3] = (1, 64)
        made = one_step.job([torch.zeros(shape) for shape in shapes], shared=shared)
        made.means = torch.zeros(1, 64) if shared else None
        with pytest.raises(RuntimeError, match=r"do not fit together"):
            backend.move([made])
        if shared:
            with pytest.raises(RuntimeError, match=r"do not fit together"):
                backend.sums(made)
        else:
            with pytest.raises(RuntimeError, match=r"do not fit together.*\(4000, 64\)"):
                torch_adamw.move([made])


@BACKENDS
@pytest.mark.parametrize(("column", "row"), [((5,), (64,)), ((50,), (8,)), ((50, 1), (64,))])
@pytest.mark.parametrize("shared", [False, True])
def test_no_vector_of_spectral_decay_is_read_beyond_its_end(
    column: tuple[int, ...], row: tuple[int, ...], shared: bool, backend: Any
) -> None:
    shapes = [(50, 64)] * 3 + [(1, 64) if shared else (50, 64)]
    short = RankOne(column=torch.zeros(column), row=torch.zeros(row))
    made = one_step.job([torch.zeros(shape) for shape in shapes], triple=short)
    made.means = torch.zeros(1, 64) if shared else None
    with pytest.raises(RuntimeError, match="do not fit together"):
        backend.move([made])


@pytest.mark.parametrize("backend", [cpu, gpu], ids=lambda m: m.__name__.split(".")[-1])
@pytest.mark.parametrize("which", range(4))
def test_no_wrong_layout_or_dtype_reaches_a_kernel_whoever_calls_it(which: int, backend: Any) -> None:
    for bad in (torch.zeros(4, 6).t(), torch.zeros(6, 4).double(), torch.zeros(6, 8)[:, ::2]):
        tensors = [torch.zeros(6, 4) for _ in range(4)]
        tensors[which] = bad
        made = one_step.job(tensors)
        made.param, made.grad, made.exp_avg, made.exp_avg_sq = tensors  # copies are contiguous
        assert backend.refuses(made)
        with pytest.raises(RuntimeError, match=r"need|do not support"):
            backend.move([made])


def test_a_singular_vector_of_another_matrix_is_refused_by_name() -> None:
    parameter = nn.Parameter(torch.randn(50, 64))
    optimizer = Adams([("table", parameter)])
    parameter.grad = torch.randn(50, 64)
    optimizer.step()
    optimizer.state[parameter]["u"] = torch.ones(7)
    with pytest.raises(RuntimeError, match=r"'table' has shape \(50, 64\), but its optimizer state"):
        optimizer.step()


def test_a_coupled_parameter_that_was_flattened_is_refused_with_the_remedy() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    optimizer = CoupledAdam(param_groups(model, coupled=[model[1]]))
    for group in optimizer.param_groups:  # what DeepSpeed ZeRO does
        group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]
        group["params"][0].grad = torch.ones_like(group["params"][0])
    with pytest.raises(RuntimeError, match=r"'1.weight' was flattened .*DeepSpeed ZeRO.*no rows to couple.*FSDP2"):
        optimizer.step()


def test_adams_without_its_matrices_is_refused_with_the_remedy() -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4))
    optimizer = Adams(model.named_parameters())
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"'0.weight' was flattened .*no singular value to decay.*FSDP2"):
        optimizer.step()
    partly = Adams(model.named_parameters())
    partly.param_groups[0]["params"][2] = flat
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), partly):
        for param in copied.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match=r"was flattened .*no singular value to decay.*FSDP2"):
            copied.step()
    vectors = Adams([model[0].bias, model[1].bias])  # a group that never had a matrix
    model[0].bias.grad = torch.ones_like(model[0].bias)
    vectors.step()


def test_an_adamw_checkpoint_without_names_and_with_other_groups_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))  # both (9, 4): position fits either

    def adamw(params) -> torch.optim.AdamW:
        optimizer = torch.optim.AdamW(params)
        model[0].weight.grad, model[1].weight.grad = torch.full((9, 4), 1.0), torch.full((9, 4), 5.0)
        optimizer.step()
        return optimizer

    coupled = CoupledAdam(param_groups(model, coupled=[model[1]]))
    with pytest.raises(
        ValueError, match=r"groups of \[2\] parameters, this optimizer of \[1, 1\].*name_checkpoint\(model"
    ):
        coupled.load_state_dict(adamw(model.parameters()).state_dict())
    unnamed = [
        {**group, "params": [p for _, p in group["params"]]} for group in param_groups(model, coupled=[model[1]])
    ]
    with pytest.raises(ValueError, match="Build this optimizer with names"):
        CoupledAdam(unnamed).load_state_dict(adamw(model.named_parameters()).state_dict())
    with pytest.raises(ValueError, match="model of the run that saved"):
        coupled.load_state_dict(torch.optim.AdamW([model[0].weight]).state_dict())
    for fits in (unnamed, model.named_parameters()):  # the same layout, or names
        coupled.load_state_dict(adamw(fits).state_dict())
        assert coupled.state[model[1].weight]["exp_avg"][0, 0].item() == pytest.approx(0.5)


@pytest.fixture
def group_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.ProcessGroup]:
    """A process group that says it has two members."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_vocabulary_group_that_cannot_be_honored_is_refused(group_of_two: dist.ProcessGroup) -> None:
    parameter = nn.Parameter(torch.randn(5, 4))
    parameter.grad = torch.randn(5, 4)
    parameter.vocabulary_group = "tp"
    with pytest.raises(TypeError, match=r"vocabulary_group.*shape \(5, 4\): str.*mesh.get_group"):
        KINDS["coupled"](parameter).step()
    parameter.vocabulary_group = group_of_two
    with pytest.raises(ValueError, match=r"\(5, 4\) is a vocabulary shard.*use_spectral_decay = False"):
        KINDS["adams"](parameter).step()
    with pytest.raises(ValueError, match=r"'table' is a vocabulary shard.*pass it to Adams or CoupledAdam"):
        KINDS["zero"](parameter)


def run(program: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.long
def test_a_forked_process_steps_without_the_kernels_and_says_so_once() -> None:
    done = run(
        """
        import os, sys, torch
        from coupled_adam import CoupledAdam
        torch.set_num_threads(2)
        p = torch.zeros(600, 300, requires_grad=True)
        p.grad = torch.ones_like(p)
        optimizer = CoupledAdam([{"params": [p], "second_moment": "vocabulary"}], lr=0.1)
        optimizer.step()
        child = os.fork()
        for _ in range(2):
            optimizer.step()
        line = f"{p[0, 0].item():.1f} {p[-1, -1].item():.1f}\\n"
        os.write(1, line.encode())  # whole, whatever the other writes
        if child:
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["-0.3"] * 4
    assert done.stderr.count("UserWarning: this process was forked") == 1
    assert "spawn" in done.stderr


@pytest.mark.long
def test_threads_may_step_optimizers_at_the_same_time_where_numba_cannot() -> None:
    done = run(
        """
        import threading, torch
        from coupled_adam import CoupledAdam
        def train():
            p = torch.zeros(600, 300, requires_grad=True)
            p.grad = torch.ones_like(p)
            optimizer = CoupledAdam([{"params": [p], "second_moment": "vocabulary"}], lr=0.1)
            for _ in range(200):
                optimizer.step()
            means.append(round(p.mean().item(), 2))  # prints of threads may share a line
        means = []
        train()
        threads = [threading.Thread(target=train) for _ in range(3)]
        for each in threads: each.start()
        for each in threads: each.join()
        print(*means)
        import numba
        print(numba.threading_layer())
        """,
        NUMBA_THREADING_LAYER="workqueue",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["-20.0"] * 4 + ["workqueue"]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_first_step_leaves_torch_as_many_threads_as_the_user_has_set(threads: int) -> None:
    done = run(
        f"""
        import torch
        from coupled_adam import CoupledAdam
        torch.set_num_threads({threads})
        p = torch.zeros(600, 300, requires_grad=True)
        p.grad = torch.ones_like(p)
        optimizer = CoupledAdam([{{"params": [p], "second_moment": "vocabulary"}}], lr=0.1)
        for _ in range(2):
            optimizer.step()
            print(torch.get_num_threads())
        """
    )
    assert done.stdout.split() == [str(threads)] * 2, done.stderr
