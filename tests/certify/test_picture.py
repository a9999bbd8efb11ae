"""The picture of a certificate: marks where the differences are, and crosses beyond tolerance."""

import copy
import math

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from equilibrium_mcore.certify import picture


def verdict(what: str, difference: float, tolerance: float) -> dict:
    passed = difference <= tolerance
    return {
        "what": what,
        "worst_relative_difference": difference,
        "tolerance": tolerance,
        "where": "step 1",
        "passed": passed,
    }


HEALTHY = {
    "run": "mine",
    "passed": True,
    "layouts": {
        "tp=2": [verdict("loss", 3e-16, 1e-9), verdict("weights loaded", 0.0, 0.0)],
        "pp=2": [verdict("loss", 2e-14, 1e-9), verdict("weights loaded", 0.0, 0.0)],
    },
    "witnesses": {"witness: a plain loop": [verdict("loss", 1e-15, 1e-9)]},
}


def marks(values: dict) -> dict[str, list[tuple[float, int]]]:
    """By label: where each mark is, as (difference, row)."""
    compared = {**values["layouts"], **values["witnesses"]}
    figure = picture.draw(values, compared)
    found = {}
    for line in figure.axes[0].get_lines():
        places = zip(line.get_xdata(), line.get_ydata(), strict=True)
        found[line.get_label()] = [(float(x), round(float(y))) for x, y in places]
    plt.close(figure)
    return found


def test_every_layout_has_a_mark_at_its_difference():
    assert marks(HEALTHY) == {
        "tolerance": [(1e-9, 0), (picture.ZERO, 1)],
        "tp=2": [(3e-16, 0), (picture.ZERO, 1)],
        "pp=2": [(2e-14, 0), (picture.ZERO, 1)],
        "witness": [(1e-15, 0)],
    }


@pytest.mark.parametrize(
    ("difference", "place"),
    [
        (1e-3, 1e-3),
        (math.nan, picture.LARGEST),
        (math.inf, picture.LARGEST),
        (1e9, picture.LARGEST),
    ],
)
def test_what_is_beyond_tolerance_is_crossed(difference, place):
    values = copy.deepcopy(HEALTHY)
    values["layouts"]["pp=2"][0] = verdict("loss", difference, 1e-9)
    assert marks(values)["pp=2: beyond tolerance"] == [(place, 0)]


def test_the_title_says_the_verdict():
    for passed, said in ((True, "mine: the same"), (False, "mine: NOT the same")):
        figure = picture.draw({**HEALTHY, "passed": passed}, HEALTHY["layouts"])
        assert figure.get_suptitle().startswith(said)
        plt.close(figure)


def test_the_png_is_written(tmp_path):
    path = picture.plot_certificate(HEALTHY, tmp_path / "certificate.png")
    assert Image.open(path).size[0] > 1000
    with pytest.raises(ValueError, match=r"\.svg must end in \.png"):
        picture.plot_certificate(HEALTHY, tmp_path / "certificate.svg")
    with pytest.raises(ValueError, match="compares nothing"):
        picture.plot_certificate({**HEALTHY, "layouts": {}, "witnesses": {}}, tmp_path / "a.png")
