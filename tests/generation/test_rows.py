"""Who continues what: everything once, within the bounds, the same shapes for all."""

from __future__ import annotations

import numpy as np
import pytest

from equilibrium_mcore.generation.interface import Prompt, Request
from equilibrium_mcore.generation.rows import plan, up_to_multiple


@pytest.mark.parametrize(("ranks", "groups", "multiple"), [(1, 1, 1), (2, 1, 2), (3, 2, 4)])
def test_every_request_is_in_one_row_and_every_prompt_in_one_pack(ranks, groups, multiple):
    random = np.random.default_rng(ranks)
    lengths = [1, 1, 40, *random.integers(1, 12, 20)]
    prompts = [Prompt.of(random.integers(0, 9, length)) for length in lengths]
    requests = [Request(prompt, sample) for prompt in prompts for sample in range(3)]
    settings = dict(rows_at_once=6, tokens_at_once=16, multiple=multiple, max_new_tokens=5)
    waves = plan(requests, ranks=ranks, groups=groups, **settings)
    seen = []
    for wave in waves:
        assert wave.rows % multiple == 0 and wave.pack_tokens % multiple == 0
        assert groups * wave.rows <= up_to_multiple(6, groups * multiple)
        assert len(wave.groups) == ranks and all(len(mine) == groups for mine in wave.groups)
        for group in (group for mine in wave.groups for group in mine):
            seen += group.requests
            assert len(group.requests) <= wave.rows and len(group.packs) <= wave.packs
            packed = [number for pack in group.packs for number in pack.prompts]
            assert packed == list(group.prompts)
            for pack in group.packs:
                sizes = [len(requests[number].prompt.ids) - 1 for number in pack.prompts]
                assert sum(sizes) <= (wave.pack_tokens if len(sizes) == 1 else 16)
                assert group.prompts[pack.first] == pack.prompts[0]
            for number, source in zip(group.requests, group.source, strict=True):
                ids = requests[number].prompt.ids
                assert len(ids) - 1 + 5 <= wave.capacity
                if len(ids) == 1:
                    assert source == -1
                else:
                    same = requests[group.prompts[source]].prompt.ids
                    assert same.tolist() == ids.tolist()
    assert sorted(seen) == list(range(len(requests)))


def test_answers_to_one_prompt_share_its_prefill():
    requests = [Request(Prompt.of([1, 2, 3]), sample) for sample in range(8)]
    (wave,) = plan(
        requests,
        ranks=1,
        groups=1,
        rows_at_once=8,
        tokens_at_once=100,
        multiple=1,
        max_new_tokens=4,
    )
    assert len(wave.groups[0][0].prompts) == 1 and wave.pack_tokens == 2
