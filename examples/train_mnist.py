"""Train a small network on handwritten digits with an optimizer of your choice, then with Adam, and compare the two.

    python examples/train_mnist.py                                      # MNIST, on all GPUs or else the CPU
    python examples/train_mnist.py --dataset digits --optimizer adams   # no download, seconds on a CPU
    torchrun --nproc-per-node 2 examples/train_mnist.py --gpu-id -1     # two processes on the CPU

An image classifier has no embedding matrix, so nothing is coupled over a vocabulary: coupled_adam is CoupledAdam with
moment coupling, in which the squared first moment enters the second.
"""

import argparse
import contextlib
import copy
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset

from coupled_adam import Adams, CoupledAdam

Images = Dataset[tuple[Tensor, int]]

#: Whether torchrun, or another program that sets what it sets, started this process.
LAUNCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
RANK, PROCESSES, LOCAL_RANK = (
    int(os.environ[name]) if LAUNCHED else alone for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
)
LOCAL_PROCESSES = int(os.environ.get("LOCAL_WORLD_SIZE", PROCESSES)) if LAUNCHED else 1

#: Lowest and highest value of each option that is a number.
LIMITS = {"batch_size": (1, math.inf), "test_batch_size": (1, math.inf), "epochs": (1, math.inf), "lr": (0, math.inf)}
LIMITS |= {"coupling_factor": (0, 1), "gpu_id": (-1, math.inf), "seed": (0, 2**32 - 1)}


def fail(message: str) -> NoReturn:
    """End with exit code 2 and one line, which only the first process on a machine prints."""
    if LOCAL_RANK == 0:
        print(f"train_mnist.py: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def say(text: str) -> None:
    """Print, once however many processes there are."""
    if RANK == 0:
        print(text, flush=True)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    text = (
        "coupled_adam: Adam with moment coupling (default); adams: bounded steps and spectral weight decay; or one of"
    )
    text += " torch.optim, sgd with momentum 0.9"
    optimizers = ["coupled_adam", "adams", "adam", "adamw", "sgd"]
    add("--optimizer", default="coupled_adam", choices=optimizers, help=text)
    add("--batch-size", type=int, default=64, help="training images a step, over all processes and GPUs (64)")
    add("--test-batch-size", type=int, default=1000, help="test images that a process takes at once (1000)")
    add("--epochs", type=int, default=10, help="passes over the training images (10)")
    add("--lr", type=float, default=0.001, help="learning rate, of Adam too (0.001)")
    add("--coupling-factor", type=float, default=0.1, help="of coupled_adam, from 0 (AdamW) to 1 (0.1)")
    add("--gpu-id", type=int, help="use this GPU, or with -1 the CPU (default: all GPUs found)")
    add("--seed", type=int, default=42, help="of initial weights, batches and the split of the digits (42)")
    add("--dataset", default="mnist", choices=["mnist", "digits"], help="digits: 8x8, inside scikit-learn (mnist)")
    add("--data-dir", type=Path, default=Path("runs/mnist"), help="where MNIST is or will be (runs/mnist)")
    options = parser.parse_args()
    for name, (low, high) in LIMITS.items():
        value = getattr(options, name)
        if value is not None and not (low <= value <= high and value != math.inf):
            wanted = f"{low} or more" if high == math.inf else f"{low} to {high}"
            fail(f"argument --{name.replace('_', '-')}: {value} is not possible; give {wanted}")
    if options.batch_size % PROCESSES:
        fail(f"argument --batch-size: {options.batch_size} is no multiple of the {PROCESSES} processes that share it")
    return options


@dataclass(frozen=True)
class Place:
    """Where this process computes."""

    device: torch.device
    gpus: list[int]
    """GPUs that share this process's batches; empty on the CPU."""
    cores: int
    """This process's share of the machine's cores."""
    layout: torch.memory_format


def find_place(gpu_id: int | None) -> Place:
    """The device that --gpu-id asks for, made ready."""
    count = torch.cuda.device_count()
    if gpu_id is not None and gpu_id >= count:
        found = f"GPUs 0 to {count - 1}" if count else "no GPU"
        fail(f"argument --gpu-id: there is no GPU {gpu_id}, PyTorch finds {found}; -1 is the CPU")
    if gpu_id not in (None, -1) and PROCESSES > 1:
        fail(f"argument --gpu-id: {PROCESSES} processes cannot share GPU {gpu_id}; leave out the option, or torchrun")
    if gpu_id is None and 0 < count < LOCAL_PROCESSES:
        fail(f"torchrun: {LOCAL_PROCESSES} processes for {count} GPU(s); start {count}, or add --gpu-id -1 for the CPU")
    everything = [LOCAL_RANK] if LAUNCHED else list(range(count))
    gpus = [] if gpu_id == -1 or count == 0 else everything if gpu_id is None else [gpu_id]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // LOCAL_PROCESSES)
    torch.set_flush_denormal(True)  # arithmetic with moments that fade out is slow on the CPU
    if LAUNCHED or "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1, which leaves cores idle
        torch.set_num_threads(cores)
    if not gpus:
        # Convolutions on the CPU are faster where the channels of a pixel lie side by side.
        return Place(torch.device("cpu"), gpus, cores, torch.channels_last)
    torch.backends.cudnn.deterministic = True  # the same losses every time
    torch.cuda.set_device(gpus[0])
    return Place(torch.device("cuda", gpus[0]), gpus, cores, torch.contiguous_format)


def digits(seed: int) -> tuple[Images, Images]:
    """Training and test images out of the 1,797 inside scikit-learn; a fifth of every digit is for the test."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        fail(f"argument --dataset: digits needs scikit-learn ({error}); pip install scikit-learn")
    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # 0 … 16 to -1 … 1
    split = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    train, test = (TensorDataset(images[part], torch.as_tensor(labels)[part]) for part in split)
    return train, test


def mnist(folder: Path) -> tuple[Images, Images]:
    """Training and test images of MNIST, downloaded unless they are in the folder."""
    try:
        from torchvision import datasets, transforms
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another version of torch
        fail(f"argument --dataset: mnist needs torchvision ({error}); pip install torchvision, or --dataset digits")
    convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])  # 0 … 255 to -1 … 1
    try:
        with contextlib.redirect_stdout(None):  # torchvision prints every address that it tries
            train, test = (datasets.MNIST(folder, part, convert, download=True) for part in (True, False))
    except (OSError, RuntimeError, ValueError) as error:
        fail(
            f"argument --dataset: mnist is not in {folder} and cannot be downloaded ({error}); connect to the internet, "
            "choose another --data-dir, or --dataset digits"
        )
    return train, test


def load(options: argparse.Namespace) -> tuple[Images, Images]:
    """Training and test images, each of shape (1, height, width), with the digits that they show."""
    return digits(options.seed) if options.dataset == "digits" else mnist(options.data_dir)


def batches(train: Images, test: Images, options: argparse.Namespace, place: Place) -> tuple[DataLoader, DataLoader]:
    """This process's share of the training and the test batches."""
    # Its order depends on seed and epoch alone and is dealt out in turn: however many processes share a batch, and
    # whichever optimizer uses it, it holds the same images.
    sampler = DistributedSampler(train, PROCESSES, RANK, shuffle=True, seed=options.seed)
    # The sampler repeats images to give all processes equally many; those of the test must count once.
    share = Subset(test, range(RANK, len(test), PROCESSES))
    # Images of MNIST are decoded one by one, best while the network computes; digits are tensors in memory already.
    workers = place.cores if options.dataset == "mnist" else 0
    common = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": bool(place.gpus)}
    train_batches = DataLoader(train, options.batch_size // PROCESSES, sampler=sampler, **common)
    return train_batches, DataLoader(share, options.test_batch_size, **common)


def build_network(side: int) -> nn.Sequential:
    """A network from images (batch, 1, side, side) to logits (batch, 10); its last layer is the output head."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * (side // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def build_optimizer(name: str, network: nn.Sequential, options: argparse.Namespace) -> Optimizer:
    """The optimizer of this name, with its own defaults beside the learning rate."""
    if name == "coupled_adam":
        return CoupledAdam(network.parameters(), lr=options.lr, coupling_factor=options.coupling_factor)
    if name == "adams":
        network[-1].weight.use_spectral_decay = False  # an output head takes plain decay
        return Adams(network.parameters(), lr=options.lr)
    if name == "sgd":
        return SGD(network.parameters(), lr=options.lr, momentum=0.9)
    return {"adam": Adam, "adamw": AdamW}[name](network.parameters(), lr=options.lr)


def prepare(
    name: str, initial: nn.Sequential, options: argparse.Namespace, place: Place
) -> tuple[nn.Module, Optimizer]:
    """A copy of the network on its device, parallel where several devices or processes share a batch; its optimizer."""
    network = copy.deepcopy(initial).to(place.device, memory_format=place.layout)
    optimizer = build_optimizer(name, network, options)
    if LAUNCHED:
        return DistributedDataParallel(network, place.gpus or None), optimizer
    return (nn.DataParallel(network, place.gpus) if len(place.gpus) > 1 else network), optimizer


def one_pass(
    network: nn.Module, batches: Iterable[list[Tensor]], place: Place, optimizer: Optimizer | None = None
) -> tuple[float, float]:
    """Mean loss and accuracy over the batches of all processes. Trains where there is an optimizer."""
    totals = torch.zeros(3, dtype=torch.float64, device=place.device)  # of losses, right answers, images
    with torch.set_grad_enabled(optimizer is not None):
        for images, labels in batches:
            images = images.to(place.device, memory_format=place.layout, non_blocking=True)
            labels = labels.to(place.device, non_blocking=True)
            logits = network(images)
            loss = cross_entropy(logits, labels)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            count = torch.full_like(loss, len(labels))
            totals += torch.stack([loss.detach() * count, (logits.argmax(1) == labels).sum(), count])
    if LAUNCHED:
        dist.all_reduce(totals)  # sums, not means: processes may hold different numbers of images
    losses, right, count = totals.tolist()
    return losses / count, right / count


def train(
    name: str, initial: nn.Sequential, loaders: tuple[DataLoader, DataLoader], options: argparse.Namespace, place: Place
) -> str:
    """Train from the initial weights, print every epoch, and return a line of the final comparison."""
    train_batches, test_batches = loaders
    # The first step compiles kernels and starts the loader's workers. A copy takes it, before the clock runs.
    network, optimizer = prepare(name, initial, options, place)
    one_pass(network, [next(iter(train_batches))], place, optimizer)
    network, optimizer = prepare(name, initial, options, place)
    seconds = 0.0
    for epoch in range(options.epochs):
        train_batches.sampler.set_epoch(epoch)
        began = time.perf_counter()
        train_loss, _ = one_pass(network, train_batches, place, optimizer)
        seconds += time.perf_counter() - began
        loss, accuracy = one_pass(network, test_batches, place)
        say(f"{name} epoch {epoch + 1}: train loss {train_loss:.4f}, test loss {loss:.4f}, accuracy {accuracy:.2%}")
    return f"{name:12}  test loss {loss:.4f}  accuracy {accuracy:.2%}  {seconds:.1f} seconds of training"


def main() -> None:
    """Train with the chosen optimizer and with Adam, from the same initial weights and on the same batches."""
    options = parse_options()
    place = find_place(options.gpu_id)
    images = load(options) if LOCAL_RANK == 0 else None
    if LAUNCHED:
        dist.init_process_group("nccl" if place.gpus else "gloo", device_id=place.device if place.gpus else None)
        dist.barrier()  # the others wait for the download
    images = images or load(options)
    loaders = batches(*images, options, place)
    torch.manual_seed(options.seed)
    initial = build_network(side=images[0][0][0].shape[-1])
    say(f"{options.dataset}: {len(images[0])} training and {len(images[1])} test images, on {place.device.type}")
    names = dict.fromkeys([options.optimizer, "adam"])  # Adam needs no comparison with itself
    lines = [train(name, initial, loaders, options, place) for name in names]
    say("\n".join(["", "The same initial weights and batches:", *lines]))
    if LAUNCHED:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
