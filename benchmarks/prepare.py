"""Speed of coupled-adam prepare against that of the tokenizer alone, Tokenizer.encode_batch on the same documents.

    python benchmarks/prepare.py [--megabytes 98] [--vocabulary 8192] [--rounds 3] [--characters 0]
        [--without-fastokens] [--workers 1,2] [--json FILE]

The text is a .jsonl made of paragraphs of the Wikipedia sample, the same every time, in documents of one to six
paragraphs, or of --characters each; the tokenizer is a BPE trained on ten megabytes of it. Both take turns, on all
cores, in wall time and in the processor time of all processes. --without-fastokens has tokenizers encode, in
processes. --workers then prepares with so many processes from the beginning, and prints which part of the processor
time is that of the thread that reads and writes, which no number of cores divides.
"""

import argparse
import json
import random
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from coupled_adam.lm.config import Data
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.sources import WikipediaSample, source_of
from coupled_adam.lm.tokenizer import END_OF_DOCUMENT, train_bpe
from coupled_adam.lm.workers import Encoders

TRAINED_ON = 10_000_000
BATCH = 1_000


def documents(megabytes: float, characters: int) -> list[str]:
    """Texts of so many megabytes in total, of so many characters each; 0: of one to six paragraphs."""
    paragraphs = [line for article in WikipediaSample().documents() for line in article.splitlines()]
    rng, made, size = random.Random(0), list[str](), 0
    while size < megabytes * 1e6:
        text = "\n".join(rng.choices(paragraphs, k=rng.randint(1, 6)))
        parts = [text[i : i + characters] for i in range(0, len(text), characters)] if characters else [text]
        made += [part for part in parts if part.strip()]
        size += len(text.encode())
    return made


def processor_seconds() -> float:
    """Return the processor time of this process and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def scaling(run: Callable[[], object], counts: list[int], megabytes: float) -> dict[str, Any]:
    """Prepare with so many processes each; what that takes."""
    found: dict[str, Any] = {}
    for count in counts:

        def starts(self: Encoders, share: float | None, count: int = count) -> None:
            if not self._processes:
                self.start(count)

        Encoders.progressed = starts  # type: ignore[method-assign]
        threads: list[float] = []
        before = processor_seconds()
        wall = harness.seconds(lambda threads=threads: threads.append(harness.thread_seconds(run)))  # type: ignore[misc]
        total = processor_seconds() - before
        found[str(count)] = {"wall": wall, "processor": total, "thread": threads[0]}
        first = found[str(counts[0])]["wall"]
        print(
            f"{count:3} processes {megabytes / wall:8.2f} MB/s, {first / wall:5.2f} times as fast as with {counts[0]}; "
            f"{total:.1f} s of processors, of which the thread that reads and writes {threads[0]:.2f} s "
            f"(1/{total / threads[0]:.0f})",
            flush=True,
        )
    return found


def main(arguments: argparse.Namespace, directory: Path) -> None:
    if arguments.without_fastokens:
        (directory / "none").mkdir()
        (directory / "none" / "fastokens.py").write_text("raise ImportError\n", encoding="utf-8")
        sys.path.insert(0, str(directory / "none"))  # for the processes, too
    texts = documents(arguments.megabytes, arguments.characters)
    table = directory / "text.jsonl"
    with table.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    megabytes = table.stat().st_size / 1e6
    share = min(TRAINED_ON / 1e6 / arguments.megabytes, 1)
    tokenizer: Tokenizer = train_bpe(texts[: int(share * len(texts))], arguments.vocabulary)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT).save_pretrained(directory / "bpe")
    data = Data(tokenizer=str(directory / "bpe"), vocab_size=arguments.vocabulary)

    def alone() -> None:
        for start in range(0, len(texts), BATCH):
            tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False)

    def prepared() -> None:
        shutil.rmtree(directory / "corpus", ignore_errors=True)
        prepare(source_of(str(table)), data, directory / "corpus")

    used: dict[str, list[float]] = {"tokenizer alone": [], "prepare": []}

    def counted(name: str, step: harness.Step) -> harness.Step:
        def run() -> None:
            before = processor_seconds()
            step()
            used[name].append(processor_seconds() - before)

        return run

    prepare(source_of(str(table)), data, directory / "corpus")  # imports what it needs
    with harness.results(arguments) as results:
        steps = {"tokenizer alone": counted("tokenizer alone", alone), "prepare": counted("prepare", prepared)}
        found = harness.in_turn(steps, arguments.rounds)
        print(f"{megabytes:.0f} MB, {len(texts):,} documents, vocabulary {arguments.vocabulary:,}")
        for name, seconds in harness.medians(found).items():
            processors = statistics.median(used[name])
            print(f"{name:16}{megabytes / seconds:8.2f} MB/s, {megabytes / processors:8.2f} MB a second of a processor")
        for name, side in (("", found), (", by processor time", used)):
            sides = (side["prepare"], side["tokenizer alone"])
            pairs = harness.Pairs([(megabytes / a, megabytes / b) for a, b in zip(*sides, strict=True)])
            print(f"prepare ÷ tokenizer alone{name}: {pairs.ratio:.2f}")
            results.add(f"prepare ÷ tokenizer alone{name}", pairs.figures("MB/s", target=0.9, at_least=True))
        if arguments.workers:
            by_count = scaling(prepared, arguments.workers, megabytes)
            (first, alone_), *more = by_count.items()
            for count, took in more:
                pairs = harness.Pairs([(megabytes / took["wall"], megabytes / alone_["wall"])])
                linear = 0.8 * int(count) / int(first)
                results.add(
                    f"prepare, {count} processes ÷ {first}", pairs.figures("MB/s", target=linear, at_least=True)
                )
            for count, took in by_count.items():
                pairs = harness.Pairs([(took["thread"], took["processor"])])
                results.add(
                    f"processor time of reading and writing ÷ of all, in {count} processes",
                    pairs.figures("s", target=0.05),
                )


if __name__ == "__main__":
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--megabytes", type=float, default=98, help="(default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--characters", type=int, default=0, help="of a document (default: one to six paragraphs)")
    parser.add_argument("--without-fastokens", action="store_true", help="have tokenizers encode, in processes")
    parser.add_argument("--workers", type=lambda text: [int(each) for each in text.split(",")], metavar="1,2,…")
    with tempfile.TemporaryDirectory() as temporary:
        main(parser.parse_args(), Path(temporary))
