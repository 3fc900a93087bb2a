"""What lm-eval 0.4.3, which the Coupled Adam paper used, did otherwise than 0.4.13."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def race_prompt(doc: Mapping[str, Any]) -> str:
    """Return the article, its questions but the last with their answers, and the last question.

    A question that ends in a blank keeps the blank and loses its words: "I have  _  ." with the answer "dog" becomes
    " _  .dog". lm-eval 0.4.13 writes the sentence: "I have dog". Nothing else differs.
    """
    *answered, asked = ast.literal_eval(doc["problems"])
    lines = [f"Article: {doc['article']}\n"]
    for problem in answered:
        question, answer = problem["question"], problem["options"]["ABCD".index(problem["answer"])]
        if question.endswith("  _  ."):
            lines.append(f" _  .{answer}")
        else:
            lines += [f"Question: {question}", f"Answer: {answer}"]
    return "\n".join([*lines, asked["question"]])


def truthfulqa_accuracy(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return the share of the true answers in the probability of all.

    ``results`` holds an answer's log-likelihood and whether it is the greedy one. The answers before the first false
    one are taken for the true ones. lm-eval 0.4.13 takes those that are labeled true, wherever they stand.
    """
    probability = np.exp([log_likelihood for log_likelihood, _ in results])
    true = list(doc["mc2_targets"]["labels"]).index(0)
    return {"acc": float(probability[:true].sum() / probability.sum())}
