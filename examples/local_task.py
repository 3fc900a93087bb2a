"""Makes a task for lm-eval out of held-out text, where no benchmark can be downloaded: which word comes next?

    python examples/local_task.py data/wikipedia-leads-bpe-8192 --out task
    coupled-adam evaluate runs/mini-long-V-s1 --only downstream --tasks next_word --include-path task

Each question is the beginning of a document and four words: the next one, and three others of as many tokens, drawn
from the same text. Guessing is right one time in four.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

try:
    from coupled_adam.errors import InputError
    from coupled_adam.files import make_directory, write_text
    from coupled_adam.lm.corpus import open_corpus
except ImportError as error:  # names the extra that is missing
    print(f"local_task.py: {error}", file=sys.stderr)
    sys.exit(2)

import numpy as np

#: As many draws for each question, on average, before the text counts as too short.
DRAWS = 1000

TASK = """\
task: next_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def main() -> None:
    """Read the options, and end with exit code 2 and one line where they cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a directory that coupled-adam prepare has written")
    parser.add_argument("--out", type=Path, default=Path("task"))
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--words", type=int, default=40, help="of a beginning, at most")
    args = parser.parse_args()
    for name, least in (("questions", 1), ("words", 9)):  # a beginning has eight words or more
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: it must be {least} or more")
    try:
        write(args)
    except (InputError, OSError) as error:
        print(f"local_task.py: {error}", file=sys.stderr)
        sys.exit(2)


def write(args: argparse.Namespace) -> None:
    """Draw the questions and write them. Raises InputError for a text that is too short."""
    corpus, dice = open_corpus(args.corpus), random.Random(0)
    tokens = np.concatenate(corpus.shards("validation"))
    documents = np.split(tokens, np.flatnonzero(tokens == corpus.meta["end_of_document"]) + 1)
    texts = [corpus.tokenizer.decode(document.tolist()).split() for document in documents]
    texts = [words for words in texts if len(words) > 10]

    if not texts:
        raise InputError(f"{args.corpus}: no held-out document has more than ten words")

    def length(word: str) -> int:
        return len(corpus.tokenizer.encode(" " + word).ids)

    pool = [word for words in texts for word in words if re.fullmatch(r"[a-zA-Z]+", word)]
    questions: list[dict[str, object]] = []
    for _ in range(DRAWS * args.questions):
        if len(questions) == args.questions:
            break
        words = dice.choice(texts)
        at = dice.randrange(8, min(len(words), args.words))
        if not re.fullmatch(r"[a-zA-Z]+", words[at]):
            continue
        alike = sorted({word for word in dice.choices(pool, k=100) if length(word) == length(words[at])} - {words[at]})
        if len(alike) < 3:
            continue
        choices = [words[at], *dice.sample(alike, 3)]
        dice.shuffle(choices)
        answer = choices.index(words[at])
        context = " ".join(words[:at])
        questions.append({"context": context, "choices": [f" {word}" for word in choices], "answer": answer})
    if len(questions) < args.questions:
        raise InputError(f"{args.corpus}: the text makes {len(questions)} questions; fewer --questions, or more text")
    make_directory(args.out)
    write_text(args.out / "next_word.jsonl", "".join(json.dumps(question) + "\n" for question in questions))
    write_text(args.out / "next_word.yaml", TASK.format(questions=(args.out / "next_word.jsonl").resolve()))
    print(f"{args.out}: {len(questions):,} questions of {len(texts):,} documents")


if __name__ == "__main__":
    main()
