"""The selective-copying task: the dataset and its accuracy as a user sees them."""

import numpy as np
import pytest
import torch

from mingru_hf.data.copying import make_selective_copying_dataset, selective_copying_accuracy

IGNORED = -100


def arrays(dataset):
    rows = dataset.with_format("numpy")[:]
    return rows["input_ids"], rows["labels"]


@pytest.mark.parametrize(("noise", "memorize", "vocab_size"), [(64, 4, 6), (3, 1, 4), (0, 3, 5), (2, 7, 16)])
def test_an_example_is_scattered_data_then_markers_and_the_answers_come_in_order(noise, memorize, vocab_size):
    dataset = make_selective_copying_dataset(50, noise, memorize, vocab_size, seed=3)
    assert dataset.column_names == ["input_ids", "labels"]
    input_ids, labels = arrays(dataset)
    context = noise + memorize
    assert input_ids.shape == labels.shape == (50, context + memorize + 1)
    assert (input_ids[:, context:] == vocab_size - 1).all()
    assert (labels[:, : context + 1] == IGNORED).all()
    for ids, answers in zip(input_ids[:, :context], labels[:, context + 1 :], strict=True):
        data = ids[ids != 0]
        np.testing.assert_array_equal(data, answers)
        assert data.min() >= 1
        assert data.max() <= vocab_size - 2


def test_data_tokens_and_positions_are_uniform():
    input_ids, _ = arrays(make_selective_copying_dataset(20_000, 16, 4, 6))
    share_of_position = (input_ids[:, :20] != 0).mean(axis=0)
    # 20,000 draws with probability 0.2: five standard deviations are 0.0141.
    np.testing.assert_allclose(share_of_position, 0.2, atol=0.0141)
    share_of_token = np.bincount(input_ids[:, :20].ravel(), minlength=6)[1:5] / 80_000
    np.testing.assert_allclose(share_of_token, 0.25, atol=0.0077)


def test_the_seed_decides():
    first, again, other = (arrays(make_selective_copying_dataset(20, seed=seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (
        make_selective_copying_dataset(20, seed=1)._fingerprint
        == make_selective_copying_dataset(20, seed=1)._fingerprint
    )


def test_the_labels_fit_a_causal_loss_that_shifts():
    from transformers.loss.loss_utils import ForCausalLMLoss

    rows = make_selective_copying_dataset(8, 10, 3, 6).with_format("torch")[:]
    input_ids, labels = rows["input_ids"], rows["labels"]
    # A model that knows the task answers at the markers themselves: its logits at step t use input_ids[: t + 1].
    logits = torch.zeros(8, 17, 6)
    for row in range(8):
        data = input_ids[row, :13][input_ids[row, :13] != 0]
        for i in range(3):
            assert input_ids[row, 13 + i] == 5
            logits[row, 13 + i, data[i]] = 100.0
    assert ForCausalLMLoss(logits, labels, vocab_size=6).item() < 1e-6
    assert selective_copying_accuracy(logits, labels) == 1.0
    assert selective_copying_accuracy(logits.numpy(), labels.numpy()) == 1.0
    logits[:4, 13] = -logits[:4, 13]
    assert selective_copying_accuracy(logits, labels) == 20 / 24


def test_rows_go_through_the_default_collator():
    from transformers import default_data_collator

    dataset = make_selective_copying_dataset(6, 10, 3, 6)
    batch = default_data_collator([dataset[i] for i in range(4)])
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 17)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert dataset.shuffle(seed=0).select([1, 2]).num_rows == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_examples": 0}, "num_examples is 0, expected at least 1"),
        ({"num_noise_tokens": -1}, "num_noise_tokens is -1, expected at least 0"),
        ({"num_memorize_tokens": 0}, "num_memorize_tokens is 0, expected at least 1"),
        ({"vocab_size": 3}, "vocab_size is 3, expected at least 4"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
    ],
)
def test_impossible_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_selective_copying_dataset(**{"num_examples": 2, **sizes})


def test_accuracy_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match=r"expected \(B, T, V\)"):
        selective_copying_accuracy(torch.zeros(2, 4, 6), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="all -100"):
        selective_copying_accuracy(torch.zeros(2, 4, 6), torch.full((2, 4), IGNORED))
