"""Examples: encoded conversations, each with its ids and which of them the model is to produce.

They lie in flat arrays, so that a million of them are six arrays that all processes can map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Example:
    """One conversation, encoded.

    Attributes:
        ids: int32[n].
        produced: bool[n]; the model is to produce this token.
        source: name of the set that it comes from.
        number: line of its file, from 1; files of a set are numbered through.
        weight: factor on its loss.
        judged: what the data says of it besides, by name: `margin` of a pair, at its chosen answer;
            `desirable` of an answer, 1 or 0.
    """

    ids: np.ndarray
    produced: np.ndarray
    source: str
    number: int
    weight: float = 1.0
    judged: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Examples:
    """All examples of a run.

    Attributes:
        ids: int32[tokens].
        produced: bool[tokens].
        lengths: int32[examples].
        source: uint16[examples], place in `names`.
        number: int64[examples].
        weight: float32[examples].
        names: of the sets.
        judged: float32[examples] by name; 0 where an example has none of the name.
    """

    ids: np.ndarray
    produced: np.ndarray
    lengths: np.ndarray
    source: np.ndarray
    number: np.ndarray
    weight: np.ndarray
    names: tuple[str, ...]
    judged: Mapping[str, np.ndarray] = field(default_factory=dict)

    ARRAYS = ("ids", "produced", "lengths", "source", "number", "weight")

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """Flat arrays of a list. Raises ValueError for an empty one."""
        if not examples:
            raise ValueError("no examples")
        names = tuple(dict.fromkeys(example.source for example in examples))
        place = {name: number for number, name in enumerate(names)}
        return cls(
            ids=np.concatenate([example.ids for example in examples]).astype(np.int32),
            produced=np.concatenate([example.produced for example in examples]).astype(bool),
            lengths=np.array([len(example.ids) for example in examples], np.int32),
            source=np.array([place[example.source] for example in examples], np.uint16),
            number=np.array([example.number for example in examples], np.int64),
            weight=np.array([example.weight for example in examples], np.float32),
            names=names,
            judged={
                name: np.array([example.judged.get(name, 0.0) for example in examples], np.float32)
                for name in sorted({name for example in examples for name in example.judged})
            },
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        start = int(self.starts[index])
        end = start + int(self.lengths[index])
        return Example(
            self.ids[start:end],
            self.produced[start:end],
            self.names[self.source[index]],
            int(self.number[index]),
            float(self.weight[index]),
            {name: float(values[index]) for name, values in self.judged.items()},
        )

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each example begins in `ids`, and where the last one ends. int64[examples + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that is trained on, in order."""
        digest = hashlib.blake2b(digest_size=16)
        arrays = [getattr(self, name) for name in ("lengths", "ids", "produced", "weight")]
        for name, values in sorted(self.judged.items()):
            digest.update(bytes(name, "utf-8"))
            arrays.append(values)
        for array in map(np.ascontiguousarray, arrays):
            for start in range(0, len(array), 1 << 22):
                digest.update(array[start : start + (1 << 22)].tobytes())
        return digest.hexdigest()
