"""Real processes: whatever the model is wrapped in, the result is that of one process, and little is sent."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
import torch
from old_torch import averages_gradients, compiles_clipped_steps, keeps_masks
from torch import Tensor, nn

from coupled_adam import Adams, Adams_ZeRO

pytestmark = pytest.mark.long

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2.py"


def assert_same(results: list[dict[str, Tensor]], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for result in results:
        assert result.keys() == expected.keys()
        for name, x in expected.items():
            torch.testing.assert_close(
                result[name], x, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(
    ("count", "layout", "vocabulary"),
    [
        (3, ("rows",), 7),
        (4, ("rows",), 7),
        (4, ("rows",), 2),
        (3, ("columns",), 7),
        (4, ("rows", "rows"), 7),
        (4, ("rows", "columns"), 2),
        (4, ("whole", "rows"), 7),
    ],
)
def test_spread_parameters_step_as_whole_ones(processes, count, layout, vocabulary) -> None:
    # All kinds of state too; "vector" stays a plain tensor beside the DTensors.
    optimizers = [name for name in jobs.OPTIMIZERS if "8bit" not in name]  # whose dice fall on the shard
    if "columns" in layout:
        optimizers.remove("tempered")  # which needs whole rows
    for optimizer in optimizers if len(layout) == 1 else ("clipped factor", "clipped adams"):
        expected = jobs.made_up(optimizer, vocabulary)
        assert_same(processes(count).run(jobs.made_up, optimizer, vocabulary, layout), expected)


@pytest.mark.parametrize("optimizer", ["coupled", "clipped", "clipped factor", "adams", "clipped adams"])
def test_a_gradient_that_only_some_processes_have(processes, optimizer) -> None:
    expected = jobs.made_up(optimizer, 7, missing=True)
    results = processes(3).run(jobs.made_up, optimizer, 7, ("rows",), missing=True)
    if "adams" not in optimizer:  # AdamW needs no reduction, so that nobody hears of the other's gradient
        for result in (expected, *results):
            del result["matrix"]
        expected = {name: x for name, x in expected.items() if not name.startswith("matrix ")}
        results = [{name: x for name, x in r.items() if not name.startswith("matrix ")} for r in results]
    assert_same(results, expected)


@pytest.mark.parametrize("rows", [[3, 4], [5, 1, 1], [2, 0, 5]], ids=str)
def test_vocabulary_shards_that_are_plain_tensors_step_as_the_whole(processes, rows) -> None:
    # From the checkpoint of an AdamW too, whose second moment is folded over all shards.
    starts = [(name, None) for name in ("coupled", "clipped", "clipped factor", "tempered")]
    starts += [(name, jobs.adamw_checkpoint(7)) for name in ("clipped", "tempered")]
    for optimizer, start in starts:
        expected = jobs.vocabulary_shards(optimizer, rows, alone=True, start=start)
        results = processes(len(rows)).run(jobs.vocabulary_shards, optimizer, rows, start=start)
        rows_apart = ("embedding", "embedding exp_avg", "embedding exp_avg_sq_rows")
        for name in [name for name in rows_apart if name in expected]:
            joined = torch.cat([result.pop(name) for result in results])
            torch.testing.assert_close(joined, expected.pop(name), rtol=1e-6, atol=1e-6, msg=f"{optimizer}: {name}")
        assert_same(results, expected)


@pytest.mark.parametrize(
    ("count", "optimizer", "layout", "expected"),
    [
        # Two coupled matrices and three others: one all-reduce for all of them and for the norm.
        (3, "coupled", ("rows",), 1),
        (3, "clipped", ("rows",), 1),
        (3, "adams", ("rows",), 1),
        (3, "clipped adams", ("rows",), 1),
        (3, "coupled", ("columns",), 0),
        (3, "clipped", ("columns",), 1),
        (3, "adams", ("columns",), 2),
        (3, "coupled", ("whole",), 0),
        (3, "clipped", ("whole",), 0),
        (3, "clipped adams", ("whole",), 0),
        (3, "clipped adams", (), 0),  # plain tensors, as under DistributedDataParallel
        # With κ the second moments wait for the norm.
        (3, "clipped factor", ("rows",), 2),
        # One for each dimension of the mesh that cuts.
        (4, "coupled", ("rows", "rows"), 2),
        (4, "coupled", ("rows", "columns"), 1),
        (4, "clipped", ("rows", "columns"), 2),
        (4, "clipped", ("whole", "rows"), 1),
    ],
)
def test_all_that_is_sent_is_an_all_reduce(processes, count, optimizer, layout, expected) -> None:
    for counts in processes(count).run(jobs.collectives, optimizer, layout):
        assert counts == ({"allreduce_": expected} if expected else {})


@pytest.mark.parametrize(
    ("count", "wrapping", "optimizer"),
    [
        (3, "fsdp", "clipped adams"),
        (4, "hsdp", "clipped"),
        (4, "fsdp+tp", "clipped adams"),
        (2, "ddp", "clipped adams"),
        (2, "zero", "clipped adams"),
    ],
)
def test_a_tied_language_model_on_text_trains_as_in_one_process(processes, count, wrapping, optimizer) -> None:
    # In float32 one process with Adams is itself 1e-6 from float64 by rounding, so Adams is compared in float64.
    dtype, tolerance = (torch.float64, 1e-12) if "adams" in optimizer else (torch.float32, 1e-6)
    results = processes(count).run(jobs.train, optimizer, wrapping, dtype)
    assert_same(results, jobs.train(optimizer, dtype=dtype), tolerance)


def test_in_float64_nothing_but_the_order_of_sums_differs(processes) -> None:
    expected = jobs.train("clipped adams", dtype=torch.float64)
    assert_same(processes(2).run(jobs.train, "clipped adams", "fsdp", torch.float64), expected, 1e-14)


@compiles_clipped_steps
def test_a_compiled_training_step(processes) -> None:
    # In float64, where only torch rounds: its AdamW keeps bias corrections in float32 while a compiler traces.
    expected = jobs.train("clipped", dtype=torch.float64, steps=10)
    assert_same(processes(2).run(jobs.train, "clipped", "fsdp", torch.float64, compiled=True), expected)


@pytest.mark.parametrize(
    ("optimizer", "wrappings"),
    [
        ("clipped", ((1, ""), (2, "fsdp"), (2, "ddp"), (4, "hsdp"))),
        pytest.param("clipped", ((4, "fsdp+tp"),), marks=keeps_masks),
        ("clipped adams", ((1, ""), (2, "tp"), (4, "hsdp"))),
    ],
)
def test_a_checkpoint_of_three_processes_loads_exactly_in_any_wrapping(
    processes, tmp_path, optimizer, wrappings
) -> None:
    saved = processes(3).run(jobs.saved, str(tmp_path), optimizer, "fsdp")[0]
    assert {"unused exp_avg", "unused exp_avg_sq", "unused step"} <= saved.keys()
    for count, wrapping in wrappings:
        assert_same_checkpoint(processes(count).run(jobs.loaded, str(tmp_path), optimizer, wrapping), saved)


@pytest.mark.parametrize(
    "wrappings", [((3, "fsdp"), (1, "")), pytest.param(((4, "fsdp+tp"),), marks=keeps_masks)], ids=str
)
def test_a_checkpoint_of_moments_in_eight_bits_loads_exactly_in_any_wrapping(processes, tmp_path, wrappings) -> None:
    saved = processes(3).run(jobs.saved, str(tmp_path), "clipped 8bit", "fsdp")[0]
    codes, scales = (saved[f"token_embedding.weight exp_avg_{key}"] for key in ("codes", "scales"))
    assert codes.dtype == torch.int8 and codes.any() and scales.shape == (jobs.VOCABULARY, 1)
    assert "unused exp_avg" in saved, "others are in float32"
    for count, wrapping in wrappings:
        for result in processes(count).run(jobs.loaded, str(tmp_path), "clipped 8bit", wrapping):
            for name, x in saved.items():
                # The dice of the steps after it fall on the numbers of each shard.
                later = 2e-3 if name.startswith("then ") and count != 3 else 0
                torch.testing.assert_close(result[name], x, rtol=0, atol=later, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("kind", "option"), [("clipped 8bit", "exp_avg_dtype='8bit'"), ("tempered", "row_exponent")])
def test_what_belongs_to_rows_needs_whole_ones(kind, option, processes) -> None:
    with pytest.raises(AssertionError, match=f"sharded over its columns, and {option} needs whole rows"):
        processes(3).run(jobs.made_up, kind, 7, ("columns",))


def test_a_checkpoint_of_zero_loads_exactly_on_any_number_of_processes(processes, tmp_path) -> None:
    saved = processes(3).run(jobs.saved, str(tmp_path), "clipped adams", "zero")[0]
    for count in (1, 2, 4):
        assert_same_checkpoint(processes(count).run(jobs.loaded, str(tmp_path), "clipped adams", "zero"), saved)


def test_a_checkpoint_is_written_while_training_goes_on(processes, tmp_path) -> None:
    saved = processes(3).run(jobs.saved, str(tmp_path), "clipped", "fsdp", wait=False)[0]
    assert_same_checkpoint(processes(2).run(jobs.loaded, str(tmp_path), "clipped", "fsdp"), saved)


def assert_same_checkpoint(results: list[dict[str, Tensor]], saved: dict[str, Tensor]) -> None:
    for result in results:
        assert result.keys() == saved.keys()
        for name, x in saved.items():
            later = 1e-6 if name.startswith("then ") else 0.0  # the steps after it; what was loaded is exact
            torch.testing.assert_close(result[name], x, rtol=0, atol=later, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_takes_any_shape_and_missing_gradients(processes, dtype) -> None:
    results = processes(3).run(jobs.zero, dtype)
    # One process with the mean gradient, float32 weights and the first process's start.
    params = [nn.Parameter(x.float()) for x in results[0]["first"]]
    groups = [{"params": params[3:4], "second_moment": "vocabulary"}, {"params": params[:3]}, {"params": params[4:]}]
    reference = Adams(groups, lr=1e-2, max_grad_norm=1.0)
    for step in range(6):
        for i, p in enumerate(params):
            parts = [r["grads"][step][i] for r in results]
            if all(part is None for part in parts):
                p.grad = None
            else:
                p.grad = torch.stack([torch.zeros_like(p) if g is None else g.float() for g in parts]).sum(0) / 3
        reference.step()
    for result in results:
        assert result["buffer"].tolist() == [0.0, 0.0]
        assert result["moments held"] <= 0.6 * result["moments"]
        for found, master, p in zip(result["params"], result["masters"], params, strict=True):
            torch.testing.assert_close(master, p.detach(), rtol=1e-6, atol=1e-6)
            assert torch.equal(found, master.to(dtype))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_in_one_process_is_adams_on_float32_weights(dtype) -> None:
    start = torch.randn(6, 4).to(dtype)
    ours, reference = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer, plain = Adams_ZeRO([ours], lr=1e-2), Adams([reference], lr=1e-2)
    optimizer.broadcast_buffers([torch.zeros(1)])
    for step in range(5):
        grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
        ours.grad, reference.grad = grad.clone(), grad.float()
        optimizer.step()
        plain.step()
        if step == 2:
            state = optimizer.state_dict()
            optimizer = Adams_ZeRO([ours], lr=1e-2)
            optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[ours]["master"], reference.detach())
    assert torch.equal(ours, reference.to(dtype))


@pytest.mark.parametrize("unscaled", [False, True])
def test_zero_says_that_it_cannot_work_with_a_scaler(unscaled: bool) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer, scaler = Adams_ZeRO([parameter]), torch.amp.GradScaler("cpu")
    scaler.scale(parameter.sum()).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="train in bfloat16"):
        scaler.step(optimizer)


def losses(output: str) -> list[str]:
    return re.findall(r"loss ([\d.]+)", output)


@averages_gradients
def test_two_agents_of_torchrun_and_a_resume_in_one_process_do_what_one_process_does(tmp_path) -> None:
    arguments = [str(EXAMPLE), "--batch", "4", "--width", "16", "--checkpoint", str(tmp_path / "checkpoints")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two-nodes"]
    torchrun += ["--local-addr", "127.0.0.1"]
    agents = [
        subprocess.Popen(
            [*torchrun, *arguments, "--steps", "10"],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    run = subprocess.run([sys.executable, *arguments, "--steps", "20"], env=environment, text=True, capture_output=True)
    resumed = losses("".join(outputs)) + losses(run.stdout)
    arguments[-1] = str(tmp_path / "others")
    whole = subprocess.run(
        [sys.executable, *arguments, "--steps", "20"], env=environment, text=True, capture_output=True
    )
    assert len(resumed) == 2, "\n".join([*outputs, run.stdout, run.stderr])
    assert [float(x) for x in resumed] == pytest.approx([float(x) for x in losses(whole.stdout)], abs=2e-5)
