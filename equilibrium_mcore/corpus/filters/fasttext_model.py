"""fastText classifiers (.bin, .ftz) that the user supplies: languages, quality."""

from __future__ import annotations

from pathlib import Path

from equilibrium_mcore.corpus.filters.optional import require, require_file

# Of the packages with this library: fasttext-numpy2-wheel 0.9.2, compiled here, trained to NaN.
INSTALL = "pip install fasttext-wheel"
LABEL_PREFIX = "__label__"


class FastTextModel:
    """A supervised fastText model; labels are given without `__label__`."""

    def __init__(self, path: Path, *, wanted_by: str, advice: str) -> None:
        """Raises FileNotFoundError, MissingLibraryError, and ValueError for another file."""
        require_file(path, wanted_by=wanted_by, key="model", advice=advice)
        fasttext = require("fasttext", wanted_by=wanted_by, install=INSTALL)
        try:
            # Its print of a warning about this call is the library's own.
            self._model = fasttext.FastText._FastText(str(path))
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ValueError(
                f"filter {wanted_by}: model={path} is not a fastText model ({error})"
            ) from None
        self.labels = {label.removeprefix(LABEL_PREFIX) for label in self._model.get_labels()}

    def probabilities(self, text: str, *, best: int = 1) -> dict[str, float]:
        """The `best` labels of a text with their probabilities, most likely first; -1 for all."""
        line = " ".join(text.split()) + "\n"
        # The binding below `predict`, which in older packages does not work with numpy 2.
        found = self._model.f.predict(line, best, 0.0, "strict")
        return {label.removeprefix(LABEL_PREFIX): min(float(p), 1.0) for p, label in found}
