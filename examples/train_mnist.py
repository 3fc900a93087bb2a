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
from functools import partial
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
Options = argparse.Namespace

#: Whether torchrun started this process, which process it is, and how many there are, here and in all.
LAUNCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
RANK, LOCAL_RANK = (int(os.environ[name]) if LAUNCHED else 0 for name in ("RANK", "LOCAL_RANK"))
PROCESSES = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
LOCAL_PROCESSES = int(os.environ.get("LOCAL_WORLD_SIZE", PROCESSES)) if LAUNCHED else 1
#: This process's share of the machine's cores.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CORES = max(1, CORES // LOCAL_PROCESSES)
LAYOUT = torch.channels_last  #: the channels of a pixel side by side, as convolution kernels want them

#: Lowest and highest value of every option that is a number.
LIMITS = {"batch_size": (1, math.inf), "test_batch_size": (1, math.inf), "epochs": (1, math.inf), "lr": (0, math.inf)}
LIMITS |= {"coupling_factor": (0, 1), "gpu_id": (-1, math.inf), "seed": (0, 2**32 - 1)}


def fail(message: str) -> NoReturn:
    """End with exit code 2 and one line, which only the first process of a machine prints."""
    if LOCAL_RANK == 0:
        print(f"train_mnist.py: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def say(text: str) -> None:
    """Print, once however many processes there are."""
    if RANK == 0:
        print(text, flush=True)


def parse_options() -> Options:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    text = "coupled_adam (default): moment coupling; adams: bounded steps, spectral decay; the others: of torch.optim"
    add("--optimizer", default="coupled_adam", choices=["coupled_adam", "adams", "adam", "adamw", "sgd"], help=text)
    add("--batch-size", type=int, default=64, help="training images a step, over all processes and GPUs; default 64")
    add("--test-batch-size", type=int, default=1000, help="test images that a process takes at once; default 1000")
    add("--epochs", type=int, default=10, help="passes over the training images; default 10")
    add("--lr", type=float, default=0.001, help="learning rate, of Adam too; default 0.001")
    add("--coupling-factor", type=float, default=0.1, help="of coupled_adam, from 0 (AdamW) to 1; default 0.1")
    add("--gpu-id", type=int, help="use this GPU, or with -1 the CPU; default all GPUs found")
    add("--seed", type=int, default=42, help="of initial weights, batches and the split of the digits; default 42")
    add("--dataset", default="mnist", choices=["mnist", "digits"], help="digits are of scikit-learn; default mnist")
    add("--data-dir", type=Path, default=Path("runs/mnist"), help="where MNIST is or will be; default runs/mnist")
    options = parser.parse_args()
    for name, (low, high) in LIMITS.items():
        value = getattr(options, name)
        if value is not None and not (low <= value <= high and value != math.inf):
            wanted = f"{low} or more" if high == math.inf else f"{low} to {high}"
            fail(f"argument --{name.replace('_', '-')}: {value} is not possible; give {wanted}")
    if options.batch_size % PROCESSES:
        fail(f"argument --batch-size: {options.batch_size} is no multiple of the {PROCESSES} processes that share it")
    return options


def find_gpus(gpu_id: int | None) -> list[int]:
    """The GPUs that this process is to use; none stands for the CPU."""
    count = torch.cuda.device_count()
    if gpu_id is not None and gpu_id >= count:
        found = f"GPUs 0 to {count - 1}" if count else "no GPU"
        fail(f"argument --gpu-id: there is no GPU {gpu_id}, PyTorch finds {found}; -1 is the CPU")
    if gpu_id not in (None, -1) and PROCESSES > 1:
        fail(f"argument --gpu-id: {PROCESSES} processes cannot share GPU {gpu_id}; leave out the option, or torchrun")
    if gpu_id is None and 0 < count < LOCAL_PROCESSES:
        fail(f"torchrun: {LOCAL_PROCESSES} processes for {count} GPU(s); start {count}, or add --gpu-id -1 for the CPU")
    if gpu_id is not None:
        return [] if gpu_id == -1 else [gpu_id]
    return [LOCAL_RANK] if LAUNCHED and count else list(range(count))


def digits(seed: int) -> tuple[Images, Images]:
    """Training and test images (1, 8, 8) with their digits, out of scikit-learn; a fifth of each is for the test."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        fail(f"argument --dataset: digits needs scikit-learn ({error}); pip install scikit-learn")
    pixels, labels = load_digits(return_X_y=True)
    images = (torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3) / 0.4  # mean 0, deviation 1
    split = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    train, test = (TensorDataset(images[part], torch.as_tensor(labels)[part]) for part in split)
    return train, test


def mnist(directory: Path) -> tuple[Images, Images]:
    """Training and test images (1, 28, 28) of MNIST with their digits, downloaded unless they are in the directory."""
    try:
        from torchvision import datasets, transforms
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        remedy = "pip install torchvision, or --dataset digits"
        fail(f"argument --dataset: mnist needs torchvision for torch {torch.__version__} ({error}); {remedy}")
    convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.13, 0.31)])  # mean 0, deviation 1
    try:
        with contextlib.redirect_stdout(None):  # torchvision prints every address that it tries
            train, test = (datasets.MNIST(directory, part, convert, download=True) for part in (True, False))
    except (OSError, RuntimeError, ValueError) as error:
        remedy = "connect to the internet, choose another --data-dir, or --dataset digits"
        fail(f"argument --dataset: mnist is not in {directory} and cannot be downloaded ({error}); {remedy}")
    return train, test


def batches(train: Images, test: Images, options: Options) -> tuple[DataLoader, DataLoader]:
    """This process's share of the training and the test batches."""
    # Its order depends on seed and epoch alone and is dealt out in turn: a batch holds the same images however many
    # processes share it, and whichever optimizer uses it.
    sampler = DistributedSampler(train, PROCESSES, RANK, shuffle=True, seed=options.seed)
    # The sampler repeats images to give all processes equally many; those of the test must count once.
    share = Subset(test, range(RANK, len(test), PROCESSES))
    # Images of MNIST are decoded one by one, best while the network computes; digits are tensors in memory already.
    workers = CORES if options.dataset == "mnist" else 0
    common = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_initialized()}
    train_batches = DataLoader(train, options.batch_size // PROCESSES, sampler=sampler, **common)
    return train_batches, DataLoader(share, options.test_batch_size, **common)


def build_network(side: int) -> nn.Sequential:
    """A network from images (batch, 1, side, side) to logits (batch, 10); its last layer is the output head."""
    convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
    dense = [nn.Flatten(), nn.Linear(32 * (side // 2) ** 2, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*convolutions, *dense)


def build_optimizer(name: str, network: nn.Sequential, options: Options) -> Optimizer:
    """The optimizer of this name, with its own defaults beside the learning rate."""
    if name == "coupled_adam":
        return CoupledAdam(network.parameters(), lr=options.lr, coupling_factor=options.coupling_factor)
    if name == "adams":
        network[-1].weight.use_spectral_decay = False  # an output head takes plain decay
        return Adams(network.parameters(), lr=options.lr)
    if name == "sgd":
        return SGD(network.parameters(), lr=options.lr, momentum=0.9)
    return {"adam": Adam, "adamw": AdamW}[name](network.parameters(), lr=options.lr)


def prepare(name: str, initial: nn.Sequential, options: Options, gpus: list[int]) -> tuple[nn.Module, Optimizer]:
    """A copy of the network, parallel where several GPUs or processes share a batch, and its optimizer."""
    network = copy.deepcopy(initial)
    optimizer = build_optimizer(name, network, options)
    if LAUNCHED:
        return DistributedDataParallel(network, gpus or None), optimizer
    return (nn.DataParallel(network, gpus) if len(gpus) > 1 else network), optimizer


def one_pass(network: nn.Module, batches: Iterable, optimizer: Optimizer | None = None) -> tuple[float, float]:
    """Mean loss and accuracy over the batches of all processes. Trains if there is an optimizer."""
    device = next(network.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # losses, right answers, images
    with torch.set_grad_enabled(optimizer is not None):
        for images, labels in batches:
            labels = labels.to(device, non_blocking=True)
            logits = network(images.to(device, memory_format=LAYOUT, non_blocking=True))
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


def train(name: str, initial: nn.Sequential, images: tuple[Images, Images], options: Options, gpus: list[int]) -> str:
    """Train from the initial weights, print every epoch, and return a line of the final comparison."""
    train_batches, test_batches = batches(*images, options)
    # The first step compiles kernels and starts the loader's workers. A copy takes it, before the clock runs.
    network, optimizer = prepare(name, initial, options, gpus)
    one_pass(network, [next(iter(train_batches))], optimizer)
    network, optimizer = prepare(name, initial, options, gpus)
    seconds = 0.0
    for epoch in range(options.epochs):
        train_batches.sampler.set_epoch(epoch)
        began = time.perf_counter()
        train_loss, _ = one_pass(network, train_batches, optimizer)
        seconds += time.perf_counter() - began
        loss, accuracy = one_pass(network, test_batches)
        say(f"{name} epoch {epoch + 1}: train loss {train_loss:.4f}, test loss {loss:.4f}, accuracy {accuracy:.2%}")
    return f"{name:12}  test loss {loss:.4f}  accuracy {accuracy:.2%}  training {seconds:.1f} s"


def main() -> None:
    """Train with the chosen optimizer and with Adam, from the same initial weights and on the same batches."""
    options = parse_options()
    gpus = find_gpus(options.gpu_id)
    device = torch.device("cuda", gpus[0]) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True  # the same losses every time
    torch.set_flush_denormal(True)  # arithmetic with moments that fade out is slow on the CPU
    if LAUNCHED or "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1, which would leave cores idle
        torch.set_num_threads(CORES if options.dataset == "mnist" else 1)  # threads would only wait for 8x8 images
    load = partial(digits, options.seed) if options.dataset == "digits" else partial(mnist, options.data_dir)
    images = load() if LOCAL_RANK == 0 else None
    if LAUNCHED:
        dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
        dist.barrier()  # the others wait for the download
    images = images or load()
    torch.manual_seed(options.seed)
    initial = build_network(side=images[0][0][0].shape[-1]).to(device, memory_format=LAYOUT)
    say(f"{options.dataset}: {len(images[0])} training and {len(images[1])} test images, on {device.type}")
    names = dict.fromkeys([options.optimizer, "adam"])  # Adam needs no comparison with itself
    lines = [train(name, initial, images, options, gpus) for name in names]
    say("\n".join(["", "From the same initial weights, on the same batches:", *lines]))
    if LAUNCHED:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
