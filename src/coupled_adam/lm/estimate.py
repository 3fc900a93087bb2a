"""What an experiment costs, without running it: parameters, memory, FLOPs; and how fast FLOPs are done."""

import re
from dataclasses import dataclass

import torch

from coupled_adam.errors import InputError
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.model import LanguageModel, parameter_count
from coupled_adam.lm.optimizers import state_bytes
from coupled_adam.lm.parallel import World

#: Dense bfloat16 FLOP/s of a GPU, from NVIDIA's data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}

#: Words in the name of a device that is slower than the GPU of the table, or a part of it.
OTHER_PEAK = {"PCIE", "NVL", "MIG"}

#: Share of the peak that training of such models is taken to reach; an assumption.
UTILIZATION = 0.4


@dataclass(frozen=True)
class Estimate:
    """Figures of an experiment. Bytes are those of one copy of the model, over all devices that share it."""

    parameters: int
    embedding_parameters: int
    tokens: int
    steps: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Of one micro-batch."""
    flops: float
    gpu: str
    gpu_hours: float


def estimate(experiment: Experiment, gpu: str = "H100") -> Estimate:
    """Estimate parameters, memory and FLOPs; counts on the device ``meta``, so no weights are allocated.

    Activations: Korthikanti et al., arXiv 2205.05198, equation 1 without the attention matrix, which is never stored:
    34·s·b·h bytes a layer in 16 bits; with checkpointing 2·s·b·h a layer and one layer's 34. FLOPs: 6 a parameter
    and token (Kaplan et al., arXiv 2001.08361) plus 12·layers·hidden_size·sequence a token for attention, a third more
    with checkpointing. The micro-batch is that of the experiment, or the whole batch.

    Raises:
        InputError: an unknown GPU.
    """
    if gpu not in PEAK_FLOPS:
        raise InputError(f"{gpu}: unknown GPU; choose from {', '.join(PEAK_FLOPS)}")
    model, data, train = experiment.model, experiment.data, experiment.train
    with torch.device("meta"):
        network = LanguageModel(model, data.padded_vocab_size, data.sequence_length)
    parameters, tokens = parameter_count(network), train.steps * train.batch_tokens
    layer = data.sequence_length * (train.micro_batch or experiment.batch_size) * model.hidden_size
    wide = 1 if train.precision == "bfloat16" else 2
    stored = 2 * model.n_layers + 34 if train.activation_checkpointing else 34 * model.n_layers
    flops = tokens * flops_per_token(experiment, parameters) * (4 / 3 if train.activation_checkpointing else 1)
    return Estimate(
        parameters=parameters,
        embedding_parameters=network.head.weight.numel(),
        tokens=tokens,
        steps=train.steps,
        weights_bytes=4 * parameters,
        gradients_bytes=4 * parameters,
        optimizer_bytes=state_bytes(experiment, network),
        activation_bytes=stored * layer * wide,
        flops=flops,
        gpu=gpu,
        gpu_hours=flops / (PEAK_FLOPS[gpu] * UTILIZATION) / 3600,
    )


def flops_per_token(experiment: Experiment, parameters: int) -> int:
    """Count the model's FLOPs for one token of training, without what checkpointing computes again.

    The head of a masked language model computes logits of the tokens alone that it is to predict.
    """
    model, data = experiment.model, experiment.data
    attention = 12 * model.n_layers * model.hidden_size * data.sequence_length
    if not model.masked:
        return 6 * parameters + attention
    unpredicted = 1 - experiment.masked_tokens / data.sequence_length
    return round(6 * (parameters - unpredicted * data.padded_vocab_size * model.hidden_size) + attention)


def peak_flops(experiment: Experiment, world: World) -> float | None:
    """Return the FLOP/s of the devices of all ranks together, or None where PEAK_FLOPS does not know them."""
    if world.device.type != "cuda" or experiment.train.precision != "bfloat16":
        return None
    words = set(re.split(r"\W+", torch.cuda.get_device_name(world.device).upper()))
    known = [peak for gpu, peak in PEAK_FLOPS.items() if gpu in words and not words & OTHER_PEAK]
    return known[0] * world.size if known else None


def speed(flops: float, peak: float | None) -> str:
    """Format FLOP/s as model FLOPs utilization (MFU), or as they are where the peak is not known."""
    if peak:
        return f"MFU {flops / peak:.1%}"
    return f"{flops / 1e12:,.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.1f} GFLOP/s"
