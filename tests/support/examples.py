"""How hypothesis draws in these tests: slow examples are those of an interpreter or of a machine that is busy, and a
fixture that chooses a backend does so for all of them."""

from hypothesis import HealthCheck, settings

_QUIET = (
    HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much,
)  # fmt: skip


def examples(most: int) -> settings:
    """The decorator of a test that gets up to so many."""
    return settings(max_examples=most, deadline=None, database=None, print_blob=True, suppress_health_check=_QUIET)
