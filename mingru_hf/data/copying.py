"""Selective copying (arXiv 2312.00752, section 4.1.1): remember the tokens that matter, skip the noise.

input      0 0 3 0 1 0 0 2 0 M M M    0: noise, M: marker
answers                      3 1 2
"""

import numpy as np
from datasets import Dataset

from .text import dataset_of_rows

NOISE_TOKEN = 0
IGNORE_INDEX = -100


def make_selective_copying_dataset(
    num_examples: int,
    num_noise_tokens: int = 64,
    num_memorize_tokens: int = 4,
    vocab_size: int = 6,
    seed: int = 0,
) -> Dataset:
    """Make examples of selective copying: data tokens scattered among noise, to be repeated at the end.

    An example has N = num_noise_tokens noise tokens (id 0) with M = num_memorize_tokens data tokens (ids 1 to
    vocab_size - 2, uniform) at random positions among them, followed by M markers (id vocab_size - 1). At the i-th
    marker, the model must predict the i-th data token. A causal model of transformers compares the logits at
    step t with labels[t + 1], so the answer to the marker at N + M + i is the label at N + M + i + 1. One more
    marker ends the sequence: nothing is predicted there, it only provides the position of the last label. With
    three noise and two data tokens:

        input_ids     0     4     0     0     1     5     5     5
        labels     -100  -100  -100  -100  -100  -100     4     1

    Args:
        num_examples: rows of the dataset.
        num_noise_tokens: noise tokens N per example.
        num_memorize_tokens: data tokens M per example.
        vocab_size: number of token ids, including noise and marker; vocab_size - 2 of them are data tokens.
        seed: seed of the examples; the same seed gives the same dataset, another seed a different one.

    Returns:
        `input_ids` and `labels`: (num_examples, N + 2 M + 1) int32, held in memory (8 bytes per step).

    Raises:
        ValueError: if a number is too small.
    """
    least = {
        "num_examples": (num_examples, 1),
        "num_noise_tokens": (num_noise_tokens, 0),
        "num_memorize_tokens": (num_memorize_tokens, 1),
        "vocab_size": (vocab_size, 4),
        "seed": (seed, 0),
    }
    for name, (value, minimum) in least.items():
        if value < minimum:
            reason = " (noise, a marker and two different data tokens)" if name == "vocab_size" else ""
            raise ValueError(f"{name} is {value}, expected at least {minimum}{reason}. Give a larger one.")

    generator = np.random.default_rng(seed)
    context = num_noise_tokens + num_memorize_tokens
    data = generator.integers(1, vocab_size - 1, (num_examples, num_memorize_tokens), dtype=np.int32)
    positions = np.sort(_distinct_positions(generator, num_examples, num_memorize_tokens, context), axis=1)

    input_ids = np.full((num_examples, context + num_memorize_tokens + 1), NOISE_TOKEN, np.int32)
    np.put_along_axis(input_ids, positions, data, axis=1)
    input_ids[:, context:] = vocab_size - 1
    labels = np.full_like(input_ids, IGNORE_INDEX)
    labels[:, context + 1 :] = data
    return dataset_of_rows({"input_ids": input_ids, "labels": labels})


def selective_copying_accuracy(logits, labels) -> float:
    """Return the fraction of data tokens that are predicted correctly; chance is 1 / (vocab_size - 2).

    Args:
        logits: (B, T, vocab_size) from a causal model: the logits at step t predict step t + 1. Torch or numpy.
        labels: (B, T) from `make_selective_copying_dataset`, not shifted; -100 where there is no target.

    Raises:
        ValueError: if the shapes do not fit, or all labels are -100.
    """
    if tuple(logits.shape[:-1]) != tuple(labels.shape) or labels.ndim != 2:
        raise ValueError(
            f"logits have the shape {tuple(logits.shape)} and labels {tuple(labels.shape)}, expected (B, T, "
            "V) and (B, T). Pass both as they are, without shifting them."
        )
    target = labels[:, 1:]
    asked = target != IGNORE_INDEX
    count = int(asked.sum())
    if count == 0:
        raise ValueError("The labels are all -100, expected data tokens to predict. Pass the dataset's own labels.")
    return int(((logits[:, :-1].argmax(-1) == target) & asked).sum()) / count


def _distinct_positions(generator: np.random.Generator, rows: int, count: int, size: int) -> np.ndarray:
    """Draw, for every row, a uniformly random set of `count` out of `size` positions: (rows, count), unsorted.

    This is Floyd's algorithm for all rows at once, which needs no array of rows x size.
    """
    drawn = np.empty((rows, count), np.int64)
    for i, last in enumerate(range(size - count, size)):
        position = generator.integers(0, last + 1, rows)
        taken = (drawn[:, :i] == position[:, None]).any(axis=1)
        drawn[:, i] = np.where(taken, last, position)
    return drawn
