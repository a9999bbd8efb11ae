"""A true tie of routing is named, and hides nothing else; quantities of 0 are compared too."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from equilibrium_mcore.certify.compare import compare, relative
from equilibrium_mcore.certify.routing import Routing, whole_routing
from equilibrium_mcore.certify.ties import compare_choices, find_tie
from equilibrium_mcore.certify.trace import Trace
from equilibrium_mcore.checkpoint.pieces import FullTensor
from equilibrium_mcore.config.schema import OptimizerConfig

LENGTH, PLACES, EXPERTS = 4, 8, 3


def _choices(changed: tuple[int, int] | None = None, margin: float = 1e-3):
    """Two steps of a layer; in a step, the token of one place goes elsewhere."""
    found = {}
    for step in (1, 2):
        chosen = torch.zeros(PLACES, EXPERTS, dtype=torch.bool)
        chosen[:, 0] = True
        margins = torch.full((PLACES,), 0.5, dtype=torch.float64)
        if changed is not None and changed[0] == step:
            chosen[changed[1]] = torch.tensor([False, True, False])
            margins[changed[1]] = margin
        found[step, 2] = Routing(chosen, margins)
    return found


def _tie(found, expected):
    return find_tie(found, expected, rounding=1e-9, length=LENGTH)


def test_a_tie_is_named_and_another_choice_is_a_fault():
    clear = _choices()
    assert _tie(clear, clear) is None
    assert compare_choices(clear, clear, tie=None).passed
    tied = _choices((2, 5), margin=1e-13)
    tie = _tie(clear, tied)
    assert tie is not None and tie.step == 2
    assert "step 2, layer 2, sequence 2, position 1" in tie.text
    assert compare_choices(clear, tied, tie=tie).passed
    fault = _choices((2, 5), margin=1e-6)
    assert _tie(clear, fault) is None
    verdict = compare_choices(clear, fault, tie=None)
    assert verdict.fails and verdict.where == "step 2, layer 2"
    assert verdict.difference == pytest.approx(1 / PLACES)


def test_a_tie_excuses_nothing_that_came_before_it():
    """The first difference decides: a fault in step 1 is none because step 2 has a tie."""
    expected = _choices((2, 5), margin=1e-13)
    expected[1, 2].margin[:] = 0.5
    found = _choices()
    found[1, 2].chosen[3] = torch.tensor([False, False, True])
    assert _tie(found, expected) is None
    del found[1, 2]
    assert _tie(found, expected) is None
    assert compare_choices(found, expected, tie=None).difference == 1.0


def _trace(**changes) -> Trace:
    whole = {"a": FullTensor(torch.ones(2), torch.ones(2))}
    trace = Trace(
        loss=[1.0, 2.0],
        aux_loss=[0.0, 0.0],
        gradient_norm=[0.0, 0.0],
        gradients=whole,
        weights={0: {"a": FullTensor(torch.zeros(2), torch.ones(2))}, 1: whole, 2: whole},
        update={},
        state={},
        choices=_choices(),
        narrow={},
    )
    return replace(trace, **changes)


def _failed(layout: Trace, reference: Trace, tie=None) -> set[str]:
    found = compare(layout, reference, optimizer=OptimizerConfig(), tie=tie)
    return {verdict.what for verdict in found if verdict.fails}


def test_quantities_that_are_0():
    assert not _failed(_trace(), _trace())
    assert _failed(_trace(aux_loss=[0.0, 1e-9]), _trace()) == {"auxiliary loss of every step"}
    assert _failed(_trace(gradient_norm=[1e-9, 0]), _trace()) == {"gradient norm of every step"}
    assert relative(0.0, 0.0) == 0 and relative(1.0, 0.0) == math.inf
    assert math.isnan(relative(math.nan, 0.0))
    # No balancing, no figure: nothing is compared, and nothing is divided.
    none = _trace(aux_loss=[None, None])
    assert not _failed(none, none)


def test_a_tie_ends_the_comparison_there():
    reference = _trace(choices=_choices((2, 5), margin=1e-13))
    layout = _trace(loss=[1.0, 2.5])
    tie = _tie(layout.choices, reference.choices)
    assert _failed(layout, reference) == {
        "loss of every step",
        "share of tokens routed elsewhere, every step",
    }
    assert not _failed(layout, reference, tie)
    assert _failed(replace(layout, loss=[1.1, 2.0]), reference, tie) == {"loss of every step"}


def test_notes_of_ranks_are_put_together():
    margins = torch.zeros(2, dtype=torch.float64)
    one = {(1, 2): [(torch.tensor([0, 3]), torch.tensor([[True], [False]]), margins)]}
    two = {(1, 2): [(torch.tensor([2, 1]), torch.tensor([[True], [False]]), margins)]}
    routing = whole_routing([one, two])[1, 2]
    assert routing.chosen.flatten().tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match="no rank routed"):
        whole_routing([one])
