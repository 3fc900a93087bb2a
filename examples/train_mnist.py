"""Train a small convolutional network on handwritten digits, with an optimizer of your choice and then with Adam.

    python examples/train_mnist.py                                     # MNIST, all GPUs or else the CPU
    python examples/train_mnist.py --dataset digits --epochs 20        # no download, seconds on a CPU
    torchrun --nproc-per-node 2 examples/train_mnist.py --gpu-id -1    # two processes on the CPU

An image classifier has no embedding matrix, so there is nothing to couple over a vocabulary: ``coupled_adam`` here is
the moment coupling of CoupledAdam, in which the squared first moment enters the second.
"""

import argparse
import contextlib
import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
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
Batches = Iterable[tuple[Tensor, Tensor]]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def fail(message: str) -> NoReturn:
    """End with exit code 2 and one line, which only the first process of a machine prints."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"train_mnist.py: {message}", file=sys.stderr)
    sys.exit(2)


def number(kind: type[int] | type[float], minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """A converter for argparse that refuses what is not a finite number in this range."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if minimum <= (value := kind(text)) <= maximum and math.isfinite(value):
                return value
        bound = f"at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not possible; give {wanted} {bound}")

    return convert


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--optimizer",
        default="coupled_adam",
        choices=["coupled_adam", "adams", "adam", "adamw", "sgd"],
        help="coupled_adam (default): Adam with the squared first moment in the second; adams: bounded steps and "
        "spectral weight decay; or one of torch.optim (sgd with momentum 0.9)",
    )
    add, whole = parser.add_argument, number(int, 1)
    add("--batch-size", type=whole, default=64, help="training images a step, all processes and GPUs together (64)")
    add("--test-batch-size", type=whole, default=1000, help="test images a process takes at once (1000)")
    add("--epochs", type=whole, default=10, help="passes over the training images (10)")
    add("--lr", type=number(float, 0), default=0.001, help="learning rate, Adam's too (0.001)")
    add("--coupling-factor", type=number(float, 0, 1), default=0.1, help="moment coupling of coupled_adam (0.1)")
    add("--gpu-id", type=number(int, -1), help="this GPU, or -1 for the CPU (default: all GPUs found)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of the weights, batches and split (42)")
    add("--dataset", default="mnist", choices=["mnist", "digits"], help="digits: 8x8, inside scikit-learn (mnist)")
    add("--data-dir", type=Path, default=Path("runs/mnist"), help="where MNIST is, or is downloaded to (runs/mnist)")
    return parser.parse_args()


@dataclass(frozen=True)
class Place:
    """Where this process works, and beside how many others."""

    device: torch.device
    gpus: list[int]
    """GPUs that this process shares its batches among; empty on the CPU."""
    launched: bool
    """Whether torchrun started this process."""
    rank: int
    processes: int
    local_rank: int
    local_processes: int

    @property
    def cores(self) -> int:
        """This process's share of the machine's cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // self.local_processes)

    @property
    def layout(self) -> torch.memory_format:
        """Convolutions on the CPU are faster where the channels of a pixel lie side by side."""
        return torch.channels_last if self.device.type == "cpu" else torch.contiguous_format

    def say(self, text: str) -> None:
        """Print, once however many processes there are."""
        if self.rank == 0:
            print(text, flush=True)


def find_place(gpu_id: int | None) -> Place:
    """The device that the option asks for, and what torchrun says in the environment."""
    launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
    rank, local_rank = (int(os.environ[name]) if launched else 0 for name in ("RANK", "LOCAL_RANK"))
    processes = int(os.environ["WORLD_SIZE"]) if launched else 1
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if launched else 1
    count = torch.cuda.device_count()
    if gpu_id is not None and gpu_id >= count:
        known = f"GPUs 0 to {count - 1}" if count else "no GPU"
        fail(f"argument --gpu-id: no GPU {gpu_id}; PyTorch finds {known} here, and -1 is the CPU")
    if gpu_id is not None and gpu_id >= 0 and processes > 1:
        fail(f"argument --gpu-id: {processes} processes cannot share GPU {gpu_id}; leave the option out, or torchrun")
    if gpu_id is None and 0 < count < local_processes:
        fail(f"torchrun: {local_processes} processes for {count} GPU(s); start {count}, or add --gpu-id -1 for the CPU")
    if gpu_id == -1 or count == 0:
        gpus = []
    elif gpu_id is not None:
        gpus = [gpu_id]
    else:
        gpus = [local_rank] if launched else list(range(count))
    device = torch.device("cuda", gpus[0]) if gpus else torch.device("cpu")
    return Place(device, gpus, launched, rank, processes, local_rank, local_processes)


def set_up(place: Place) -> None:
    """Threads on the CPU; on a GPU convolutions that give the same result every time."""
    torch.backends.cudnn.deterministic = True
    torch.set_flush_denormal(True)  # moments that fade out make arithmetic slow on the CPU
    if place.gpus:
        torch.cuda.set_device(place.device)
    if place.launched or "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1, which leaves cores idle
        torch.set_num_threads(place.cores)


def load_images(options: argparse.Namespace) -> tuple[Images, Images]:
    """Training and test images, each (1, height, width), with their digits."""
    return digits(options.seed) if options.dataset == "digits" else mnist(options.data_dir)


def digits(seed: int) -> tuple[Images, Images]:
    """The 1797 digits inside scikit-learn; a fifth of each digit is for the test."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        fail(f"argument --dataset: 'digits' needs scikit-learn ({first_line(error)}); pip install scikit-learn")
    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    split = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    train, test = (TensorDataset(images[part], torch.as_tensor(labels)[part]) for part in split)
    return train, test


def mnist(folder: Path) -> tuple[Images, Images]:
    """MNIST, downloaded unless it is in ``folder`` already."""
    try:
        from torchvision import datasets, transforms
    except (ImportError, RuntimeError) as error:  # RuntimeError: made for another version of torch
        fail(
            f"argument --dataset: 'mnist' needs torchvision ({first_line(error)}); pip install torchvision, or choose "
            "--dataset digits"
        )
    # Mean and standard deviation of the training pixels
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    try:
        with contextlib.redirect_stdout(None):  # torchvision prints every address that it tries
            train, test = (datasets.MNIST(folder, part, transform, download=True) for part in (True, False))
    except (OSError, RuntimeError, ValueError) as error:
        fail(
            f"argument --dataset: 'mnist' cannot be loaded from {folder} or downloaded to it ({first_line(error)}); "
            "connect to the internet, or choose --dataset digits"
        )
    return train, test


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def batches(train: Images, test: Images, options: argparse.Namespace, place: Place) -> tuple[DataLoader, DataLoader]:
    """This process's share of the training and test batches.

    The sampler's order depends on seed and epoch alone, and is dealt out in turn: whatever the number of processes, a
    step sees the same images.
    """
    if options.batch_size % place.processes:
        fail(f"argument --batch-size: {options.batch_size} cannot be split evenly among {place.processes} processes")
    sampler = DistributedSampler(train, place.processes, place.rank, shuffle=True, seed=options.seed)
    # A sampler would repeat test images to give all processes equally many; the accuracy must count each once.
    share = Subset(test, range(place.rank, len(test), place.processes))
    # MNIST is decoded image by image, which workers do meanwhile; the digits are tensors in memory already.
    workers = place.cores if options.dataset == "mnist" else 0
    common = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": bool(place.gpus)}
    return (
        DataLoader(train, options.batch_size // place.processes, sampler=sampler, **common),
        DataLoader(share, options.test_batch_size, **common),
    )


class Network(nn.Module):
    """Two convolutions that halve the image each, one hidden layer, ten classes."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * (side // 4) ** 2, 128), nn.ReLU()),
        )
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, 10) of images (batch, 1, side, side)."""
        return self.head(self.body(images))


def build_optimizer(name: str, model: Network, options: argparse.Namespace) -> Optimizer:
    """The optimizer of this name, with its own defaults beside the learning rate."""
    if name == "coupled_adam":
        return CoupledAdam(model.parameters(), lr=options.lr, coupling_factor=options.coupling_factor)
    if name == "adams":
        model.head.weight.use_spectral_decay = False  # an output head takes plain decay
        return Adams(model.parameters(), lr=options.lr)
    if name == "sgd":
        return SGD(model.parameters(), lr=options.lr, momentum=0.9)
    return {"adam": Adam, "adamw": AdamW}[name](model.parameters(), lr=options.lr)


def one_pass(
    model: nn.Module, loader: Batches, place: Place, optimizer: Optimizer | None = None
) -> tuple[float, float]:
    """Mean loss and accuracy over the batches of all processes; trains if given an optimizer."""
    totals = torch.zeros(3, dtype=torch.float64, device=place.device)  # loss, correct, images
    with torch.set_grad_enabled(optimizer is not None):
        for images, labels in loader:
            images = images.to(place.device, memory_format=place.layout, non_blocking=True)
            labels = labels.to(place.device, non_blocking=True)
            logits = model(images)
            loss = cross_entropy(logits, labels)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            count = torch.full_like(loss, len(labels))
            totals += torch.stack([loss.detach() * count, (logits.argmax(1) == labels).sum(), count])
    if place.launched:
        dist.all_reduce(totals)  # sums, not means: processes may hold different numbers of images
    loss_sum, correct, count = totals.tolist()
    return loss_sum / count, correct / count


def prepare(name: str, initial: Network, options: argparse.Namespace, place: Place) -> tuple[nn.Module, Optimizer]:
    """A copy of the network on its device, parallel where there is something to share, and its optimizer."""
    model = copy.deepcopy(initial).to(place.device, memory_format=place.layout)
    optimizer = build_optimizer(name, model, options)
    if place.launched:
        return DistributedDataParallel(model, place.gpus or None), optimizer
    return (nn.DataParallel(model, place.gpus) if len(place.gpus) > 1 else model), optimizer


def train(
    name: str,
    initial: Network,
    train_loader: DataLoader,
    test_loader: DataLoader,
    options: argparse.Namespace,
    place: Place,
) -> tuple[float, float, float]:
    """Train from the initial weights, print every epoch, and return test loss, accuracy and seconds of training."""
    # A first step compiles kernels and starts the workers of the loader. It goes to a copy, and is not timed.
    network, optimizer = prepare(name, initial, options, place)
    one_pass(network, [next(iter(train_loader))], place, optimizer)
    network, optimizer = prepare(name, initial, options, place)
    seconds = 0.0
    for epoch in range(options.epochs):
        train_loader.sampler.set_epoch(epoch)
        began = time.perf_counter()
        loss, _ = one_pass(network, train_loader, place, optimizer)
        seconds += time.perf_counter() - began
        test_loss, accuracy = one_pass(network, test_loader, place)
        place.say(
            f"{name}, epoch {epoch + 1}: training loss {loss:.4f}, test loss {test_loss:.4f}, accuracy {accuracy:.2%}"
        )
    return test_loss, accuracy, seconds


def main() -> None:
    """Train with the optimizer that was asked for and with Adam, and print both results."""
    options = parse_options()
    place = find_place(options.gpu_id)
    set_up(place)
    images = load_images(options) if place.local_rank == 0 else None
    if place.launched:
        dist.init_process_group("nccl" if place.gpus else "gloo", device_id=place.device if place.gpus else None)
        dist.barrier()  # the others wait for the download
    train_images, test_images = images or load_images(options)
    loaders = batches(train_images, test_images, options, place)
    torch.manual_seed(options.seed)
    initial = Network(side=train_images[0][0].shape[-1])
    place.say(
        f"{options.dataset}: {len(train_images)} training and {len(test_images)} test images, {place.device.type}"
    )
    results = {
        name: train(name, initial, *loaders, options, place) for name in dict.fromkeys([options.optimizer, "adam"])
    }
    place.say(f"\nThe same initial weights and batches{'':8}test loss{'':3}accuracy{'':4}seconds")
    for name, (loss, accuracy, seconds) in results.items():
        place.say(f"{name:44}{loss:9.4f}{accuracy:11.2%}{seconds:11.1f}")
    if place.launched:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
