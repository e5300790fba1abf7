"""The problems: where they come from, how they are asked, and how an answer is scored."""

import functools
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Any

import pretrained
import torch
from torch import Tensor

# Six of reasoning_gym's gsm_symbolic templates, of two or three short lines of working, whose arithmetic a 135M model
# can pick up in some hundred problems, though not all of it: 6 girls and boys, 10 ages, 16 friends, 31 slices,
# 43 books, 72 blocks. Length is what a step costs.
TEMPLATES = (6, 10, 16, 31, 43, 72)

IGNORED = -100  # cross_entropy's label of what is not scored


@dataclass(frozen=True)
class Problem:
    question: str
    solution: str
    """Worked; the answer is the number after "####", or the last one."""


@dataclass(frozen=True)
class Task:
    """Problems and how to ask them. No question of `held_out` or `test` is in `train`."""

    prompt: str
    """With {question} in it."""
    train: Sequence[Problem]
    """In the order of training."""
    held_out: Sequence[Problem]
    """For the loss on answers that were not trained on."""
    test: Sequence[Problem]
    """For exact match."""
    max_tokens: int
    """Longer training examples lose their end, as in the original protocol."""
    max_new_tokens: int
    """Given to an answer in `test`."""


def gsm_symbolic(train: int, test: int, seed: int, excluded: Set[Any] = frozenset()) -> Task:
    """Grade-school problems with fresh numbers. None in training has a test problem's template and numbers, and none at
    all has any of those `excluded`.
    """
    generators = _generators()
    held_out = _draw(generators, test, f"test {seed}", excluded)
    seen = {_numbers(template, problem) for template, problem in held_out}
    training = _draw(generators, train, f"train {seed}", seen | excluded)
    problems = [problem for _, problem in held_out]
    # The longest worked solution of these templates takes 60 tokens of SmolLM2's.
    return Task("Question: {question}\nAnswer:", [p for _, p in training], problems, problems, 256, 64)


def asked(test: int, seed: int) -> set[Any]:
    """Templates and numbers of the test problems of `gsm_symbolic` with this seed."""
    return {_numbers(template, problem) for template, problem in _draw(_generators(), test, f"test {seed}", set())}


def metamath(train: int, test: int, seed: int) -> Task:
    """MetaMathQA to GSM8K, as the original lora-lite's benchmark asks them. Needs the Hub (or its cache)."""
    from datasets import load_dataset

    try:
        rows = load_dataset("meta-math/MetaMathQA", split="train").shuffle(seed=seed)
        gsm8k = load_dataset("openai/gsm8k", "main", split="test")
    except OSError as error:
        raise pretrained.NotReachedError(pretrained.not_reached("MetaMathQA and GSM8K", error)) from error
    problems = [Problem(row["question"], row["answer"]) for row in gsm8k.select(range(min(test, len(gsm8k))))]
    asked = {p.question for p in problems}
    # Some more than needed, for those that are asked in the test or repeat.
    pool = dict.fromkeys(
        Problem(row["query"], row["response"])
        for row in rows.select(range(min(len(rows), 2 * train + 64)))
        if row["query"] not in asked
    )
    held_out, training = list(pool)[:64], list(pool)[64 : 64 + train]
    questions = {p.question for p in held_out}
    training = [p for p in training if p.question not in questions]
    prompt = "Question: {question} Think step by step.\nAnswer:"
    return Task(prompt, training, held_out, problems, 768, 300)


TASKS: dict[str, Callable[[int, int, int], Task]] = {"gsm_symbolic": gsm_symbolic, "metamath": metamath}


def answer_number(text: str) -> Decimal | None:
    """The number after the first "####", or where there is none, the last number; None without a number."""
    number = r"(?<!\w)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
    found = re.findall(number, text.partition("####")[2])[:1] or re.findall(number, text)[-1:]
    return Decimal(found[0].replace(",", "")) if found else None


def correct(prediction: str, problem: Problem) -> bool:
    """Exact match of the numbers: 1,000 is 1000.0."""
    answer = answer_number(prediction)
    return answer is not None and answer == answer_number(problem.solution)


def encode(tokenizer: Any, task: Task, problem: Problem) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the answer, which ends in the end-of-text token."""
    prompt = tokenizer(task.prompt.format(question=problem.question)).input_ids
    answer = tokenizer(" " + problem.solution, add_special_tokens=False).input_ids
    return prompt, [*answer, tokenizer.eos_token_id][: max(1, task.max_tokens - len(prompt))]


def collate(examples: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, padded on the right. Only answers have labels."""
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in examples:
        used, free = len(prompt) + len(answer), width - len(prompt) - len(answer)
        rows["input_ids"].append(prompt + answer + [pad] * free)
        rows["attention_mask"].append([1] * used + [0] * free)
        rows["labels"].append([IGNORED] * len(prompt) + answer + [IGNORED] * free)
    return {name: torch.tensor(row) for name, row in rows.items()}


def collate_prompts(prompts: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    """input_ids and attention_mask, padded on the left, so that every answer starts at the same place."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


@functools.cache
def _generators() -> dict[int, Callable[[Random, float], dict[str, Any]]]:
    import reasoning_gym

    return reasoning_gym.create_dataset("gsm_symbolic", size=1, seed=0).generators  # type: ignore[attr-defined]


def _draw(generators: Any, count: int, seed: str, excluded: Set[Any]) -> list[tuple[int, Problem]]:
    """`count` problems with their templates, in turn over the templates, shuffled by rounds."""
    rng = Random(seed)
    drawn: list[tuple[int, Problem]] = []
    while len(drawn) < count:
        for template in rng.sample(TEMPLATES, len(TEMPLATES)):
            while True:
                example = generators[template](rng, 1.0)
                problem = Problem(example["question"], example["metadata"]["answer_cot"])
                if _numbers(template, problem) not in excluded:
                    break
            drawn.append((template, problem))
    return drawn[:count]


def _numbers(template: int, problem: Problem) -> tuple[int, tuple[str, ...]]:
    return template, tuple(re.findall(r"\d+", problem.question))
