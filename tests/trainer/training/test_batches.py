"""batches: labels, padding and boundaries are what the loss stands on."""

from __future__ import annotations

from array import array

from trainer.training.batches import IGNORE, Example, accumulation, packed, padded, row, sample


def example(name: str, ids: list[int], *spans: tuple[int, int]) -> Example:
    return Example(name, array("i", ids), spans)


ONE = example("b", [2, 11, 12, 13], (2, 4))
TWO = example("a", [2, 21, 22, 23, 24, 25], (1, 2), (4, 6))


def test_only_spans_bear_loss() -> None:
    assert ONE.labels == [IGNORE, IGNORE, 12, 13]
    assert TWO.labels == [IGNORE, 21, IGNORE, IGNORE, 24, 25]


def test_padding_is_masked_bears_no_loss_and_stands_at_the_right() -> None:
    batch = padded([row(ONE), row(TWO)])
    assert batch["input_ids"][0] == [2, 11, 12, 13, 0, 0]
    assert batch["labels"][0] == [IGNORE, IGNORE, 12, 13, IGNORE, IGNORE]
    assert batch["attention_mask"][0] == [1, 1, 1, 1, 0, 0]
    assert batch["position_ids"] == [[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 5]]


def test_packed_records_keep_positions_and_boundaries_of_their_own() -> None:
    found = packed([row(ONE, TWO), row(ONE)])
    assert found.input_ids == [*ONE.ids, *TWO.ids, *ONE.ids]
    assert found.position_ids == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert found.cu_seqlens == [0, 4, 10, 14] and found.longest == 6
    assert found.labels == [*ONE.labels, *TWO.labels, *ONE.labels]


def test_a_records_first_token_never_bears_loss_so_no_label_crosses_a_boundary() -> None:
    found = packed([row(ONE, TWO)])
    assert all(found.labels[start] == IGNORE for start in found.cu_seqlens[:-1])


def test_the_sample_is_the_same_in_any_order() -> None:
    assert [one.id for one in sample([ONE, TWO], 1)] == [one.id for one in sample([TWO, ONE], 1)] == ["a"]


def test_accumulation_follows_from_tokens_per_step() -> None:
    assert accumulation(16384, 1, 4096) == 4
    assert accumulation(16384, 1, 5000) == 3
    assert accumulation(100, 16, 31) == 1, "never less than one pass"
