"""The benchmark of generate(): its table of features detects wrong results, and MinGRU's column is correct."""

import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for models this small, more threads only wait for each other
    yield importlib.import_module("benchmark_generate")
    torch.set_num_threads(threads)


def test_the_table_of_features_holds_for_our_column(benchmark, capsys):
    """README's claims about MinGRU, tried out as the script does."""
    table = benchmark.print_features(benchmark.parse_args(["--models", "MinGRU"]))
    assert {name: row["MinGRU"] for name, row in table.items() if row["MinGRU"] != "exact"} == {
        "size of the cache": "constant"
    }
    assert capsys.readouterr().out.count("| exact |") == len(table) - 1


def test_the_table_of_features_tells_wrong_from_right(benchmark):
    model = benchmark.tiny_models(["MinGRU"])["MinGRU"]

    def off_by_one(model, ids):
        return benchmark.generate(model, ids), benchmark.greedy(model, ids.roll(1, 1))

    def refused(model, ids):
        return benchmark.generate(model, ids, cache_implementation="quantized")

    assert benchmark.try_out(off_by_one, model, 0) == ("wrong", "")
    cell, error = benchmark.try_out(refused, model, 0)
    assert cell == "refused"
    assert error.startswith("ValueError")


@pytest.mark.slow
def test_a_million_tokens_leave_memory_where_it_was(benchmark):
    for points in benchmark.measure_memory(1_000_000).values():
        megabytes = [point[1] for point in points]
        assert megabytes[-1] - megabytes[0] < 5


@pytest.mark.parametrize(("tokens", "counted"), [(95, 90), (3, 10), (12_345, 12_340), (19_990, 20_000)])
def test_any_number_of_tokens_is_read_in_equal_parts(benchmark, tokens, counted):
    points = benchmark.measure_memory(tokens)
    assert [[point[0] for point in part] for part in points.values()] == [
        [counted * number // 10 for number in range(1, 11)]
    ] * 2
