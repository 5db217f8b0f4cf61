import pytest

from stages.evaluate import wilson_interval


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # The example and the extremes in Newcombe, Statistics in Medicine 17, 1998, table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
