"""The card that training writes: the metadata that the Hub reads, and the text."""

import pytest
from huggingface_hub import ModelCard

from mingru_hf import MinGRUConfig, MinGRUForCausalLM
from mingru_hf.training.arguments import TrainArguments
from mingru_hf.training.hub import name_model_card
from mingru_hf.training.model_card import may_be_rewritten, write_model_card

RESULTS = {
    "final": {"eval_loss": 1.23456789, "eval_perplexity": 3.4369, "eval_accuracy": 0.5, "eval_other": 7.0},
    "best": {"eval_loss": 0.5},
    "step": 1200,
    "epoch": 2.5,
    "examples_per_step": 96,
    "train_seconds": 1234.0,
    "mixed_precision": "bf16",
    "num_warmup_steps": 77,
    "data_settings": {"packing": "reset"},
}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes the card of a tiny model and returns it as the Hub parses it."""
    model = MinGRUForCausalLM(MinGRUConfig(vocab_size=7, hidden_size=8, num_hidden_layers=2, use_mlp=False))

    def card(results=RESULTS, args=None, dataset_name="Märchen", **kwargs):
        args = TrainArguments(output_dir=str(tmp_path / "fox")) if args is None else args
        write_model_card(tmp_path / "README.md", model, args, results, dataset_name, **kwargs)
        return ModelCard.load(tmp_path / "README.md")

    return card


def test_the_hub_reads_kind_tags_and_results(write):
    data = write(task="text-generation").data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", "fox")
    assert data.tags == ["mingru", "generated-by-mingru-hf"]
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"loss": 1.234568, "perplexity": 3.4369, "accuracy": 0.5}
    assert {(result.task_type, result.dataset_name) for result in data.eval_results} == {
        ("text-generation", "Märchen")
    }
    data = write().data  # without one of the Hub's tasks
    assert data.pipeline_tag is None
    assert {result.task_type for result in data.eval_results} == {"other"}


def test_the_text_tells_how_large_and_how_trained(write):
    text = write().text
    for part in (
        "# fox\n",
        "(hidden_size 8, num_hidden_layers 2, vocab_size 7), trained on Märchen",
        "| Validation loss (nats per token) | 1.2346 |\n| Perplexity | 3.4369 |\n| Accuracy | 0.5000 |\n",
        "1,200 optimizer steps of 96 examples (2.50 epochs) in 1,234 s, mixed precision bf16.",
        "- `learning_rate`: 0.001\n",
        "- `num_warmup_steps`: 77\n- `packing`: reset\n",
    ):
        assert part in text
    assert "(a stream)" in write(RESULTS | {"epoch": None}).text


def test_the_name_of_a_file_is_text_whatever_it_holds(write):
    card = write(dataset_name="a\n# <b>[b](c)*_d.txt")
    assert "trained on a # \\<b\\>\\[b\\](c)\\*\\_d.txt with mingru-hf.\n" in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {"a\n# <b>[b](c)*_d.txt"}


def test_clips_have_no_perplexity(write):
    card = write(unit="clip", task="video-classification")
    assert "Validation loss (nats per clip)" in card.text
    assert "Perplexity" not in card.text
    assert {result.metric_type for result in card.data.eval_results} == {"loss", "accuracy"}
    assert 'pipeline("video-classification", model="' in card.text


def test_the_example_loads_from_where_the_model_is(write, tmp_path):
    for task in (None, "text-classification"):
        assert f'= AutoModel.from_pretrained("{tmp_path / "fox"}")' in write(task=task).text
    args = TrainArguments(output_dir=r"C:\new\Users")
    assert r'= AutoModel.from_pretrained("C:\\new\\Users")' in write(args=args).text
    args = TrainArguments(output_dir="runs/fox", push_to_hub=True, hub_model_id="me/fox")
    text = write(args=args, auto_class="AutoModelForSequenceClassification").text
    assert '= AutoModelForSequenceClassification.from_pretrained("me/fox")' in text
    assert "from transformers import AutoModelForSequenceClassification\n" in text


def test_a_card_follows_its_model_to_the_hub(write, tmp_path):
    path = tmp_path / "README.md"
    for task, count in (("text-generation", 2), ("video-classification", 1), (None, 1)):
        write(task=task)
        before = path.read_text(encoding="utf-8")
        name_model_card(path, "me/größe")
        after = path.read_text(encoding="utf-8")
        assert after.count('"me/größe"') == count
        assert after == before.replace(f'"{tmp_path / "fox"}"', '"me/größe"')
    path.write_text(before.replace("generated-by-mingru-hf", "mine"))
    name_model_card(path, "me/fox")
    assert path.read_text() == before.replace("generated-by-mingru-hf", "mine")
    path.unlink()
    name_model_card(path, "me/fox")
    assert not path.exists()


def test_only_a_card_that_nobody_edited_may_be_rewritten(write, tmp_path):
    path = tmp_path / "README.md"
    assert may_be_rewritten(path)
    write(task="text-generation")
    assert may_be_rewritten(path)
    name_model_card(path, "me/größe")  # an upload does this
    assert may_be_rewritten(path)
    generated = path.read_bytes()
    for content in (
        generated + b"Mine.\n",
        generated.replace(b"## Results", b"## My results"),
        b"# Mine\n",
        b"\xff",
        b"",
        generated[: generated.rindex(b"<!--")],  # the checksum has been removed
    ):
        path.write_bytes(content)
        assert not may_be_rewritten(path)
