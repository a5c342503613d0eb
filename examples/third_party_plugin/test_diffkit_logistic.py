"""The schedule keeps diffkit's contract, whatever its options."""

from diffkit_logistic import logistic

from diffkit.testing import check_schedule


def test_logistic() -> None:
    check_schedule(logistic)
    check_schedule(logistic, median=1.0, scale=1.5)
