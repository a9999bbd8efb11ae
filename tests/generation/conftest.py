"""One rank in this process, and small models with every weight random."""

from tests.models.conftest import build, single_rank, small_model  # noqa: F401  (fixtures)
