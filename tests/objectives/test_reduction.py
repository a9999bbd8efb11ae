"""Weights of tokens: the same sums by a loop over lists, however the documents are laid out."""

from __future__ import annotations

import pytest
import torch

from equilibrium_mcore.objectives.reduction import REDUCTIONS, document_numbers

# Documents as (length, counted positions); the last has none that counts.
DOCUMENTS = [(5, [1, 2]), (3, [0, 1, 2]), (4, [3]), (4, [])]


def laid_out(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mask, positions and made-up losses of rows of documents, by their number in DOCUMENTS."""
    masks, positions, losses = [], [], []
    for row in rows:
        mask, position, loss = [], [], []
        for number in row:
            length, counted = DOCUMENTS[number]
            mask += [float(i in counted) for i in range(length)]
            position += list(range(length))
            loss += [1.0 + number + 0.1 * i for i in range(length)]
        masks.append(mask)
        positions.append(position)
        losses.append(loss)
    return torch.tensor(masks), torch.tensor(positions), torch.tensor(losses)


def by_hand(reduction: str, length: int | None) -> float:
    losses = [[1.0 + n + 0.1 * i for i in counted] for n, (_, counted) in enumerate(DOCUMENTS)]
    losses = [document for document in losses if document]
    if reduction == "token_mean":
        return sum(map(sum, losses)) / sum(map(len, losses))
    if reduction == "sequence_mean":
        return sum(sum(document) / len(document) for document in losses) / len(losses)
    return sum(map(sum, losses)) / (len(losses) * length)


@pytest.mark.parametrize(
    "micro_batches", [[[[0, 1], [2, 3]]], [[[0, 1]], [[3, 2]]], [[[0, 1, 2, 3]]]]
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sums_are_those_of_a_loop_however_the_batch_is_cut(reduction, micro_batches):
    total, divisor = 0.0, 0.0
    for rows in micro_batches:
        mask, positions, losses = laid_out(rows)
        weight, part = REDUCTIONS[reduction](mask, positions, 7)
        total, divisor = total + float((losses * weight).sum()), divisor + part
    assert total / divisor == pytest.approx(by_hand(reduction, 7), rel=1e-6)


def test_documents_of_different_rows_are_different_documents():
    _, positions, _ = laid_out([[0, 1], [2, 3]])
    assert document_numbers(positions).unique().tolist() == [0, 1, 2, 3]
    assert document_numbers(torch.tensor([[3, 4, 0], [0, 1, 2]])).tolist() == [[0, 0, 1], [2, 2, 2]]


def test_constant_length_needs_its_constant():
    mask, positions, _ = laid_out([[0, 1]])
    with pytest.raises(ValueError, match="length"):
        REDUCTIONS["constant_length"](mask, positions, None)
