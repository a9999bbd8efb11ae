"""Equality of LaTeX expressions by math-verify, for a process that may be killed.

math-verify has no end for some answers (`5^{5^{5^{5}}}`) and its own timeout is an alarm, which is
for main threads alone and does not reach into one long multiplication. So it is called without a
timeout, in a worker of `pool.py` that is killed by the clock.
"""

from __future__ import annotations

import importlib.util
import logging

from equilibrium_mcore.verification.compare import Expressions, Rules
from equilibrium_mcore.verification.tidy import as_latex

INSTALL = "pip install 'equilibrium_mcore[verification]'"
DIGITS = 12  # of decimals beside an exact constant, where no tolerance is set


def is_installed() -> bool:
    """Whether math-verify can be imported."""
    return importlib.util.find_spec("math_verify") is not None


def math_verify_expressions(rules: Rules) -> Expressions:
    """The comparison by math-verify. Raises ImportError that says what to install."""
    try:
        import math_verify
        from latex2sympy2_extended import NormalizationConfig
    except ImportError as error:
        raise ImportError(f"latex: math_verify needs math-verify ({error}): {INSTALL}") from None
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    # Its units are our own rules' business: it would take the t of 2t for tonnes and drop it.
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none"
    )
    extraction = math_verify.LatexExtractionConfig(normalization_config=normalization)

    def read(text: str):
        # One expression in delimiters: none of math-verify's search for answers in prose.
        return math_verify.parse(
            f"${as_latex(text)}$",
            extraction_config=[extraction],
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )

    def are_same(truth: str, answer: str) -> bool | None:
        ours, theirs = read(truth), read(answer)
        if not ours or not theirs:
            return None
        close = None if rules.is_exact else _are_close(ours[0], theirs[0], rules)
        if close is not None:
            return close
        digits = {"float_rounding": DIGITS, "numeric_precision": DIGITS + 3}
        return bool(math_verify.verify(ours, theirs, timeout_seconds=None, **digits))

    return are_same


def _are_close(truth, answer, rules: Rules) -> bool | None:
    """Constants within the tolerances; None for what is none."""
    from fractions import Fraction

    values = []
    for expression in (truth, answer):
        if not getattr(expression, "is_number", False):
            return None
        value = expression.evalf(30)
        if not (value.is_real and value.is_finite):
            return None
        values.append(Fraction(str(value)))
    return rules.are_close(values[0], values[1])
