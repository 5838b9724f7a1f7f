"""Adams-Bashforth has its textbook weights and integrates polynomials exactly."""

import pytest
from references import float64

from oss_exp.solvers.adams_bashforth import AdamsBashforth


@pytest.mark.parametrize(
    ("order", "weights"),
    [
        (1, [1]),
        (2, [3 / 2, -1 / 2]),
        (3, [23 / 12, -16 / 12, 5 / 12]),
        (4, [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
    ],
)
def test_the_textbook_weights_on_even_steps(order, weights):
    times = [float64(0.5 + 0.1 * h) for h in range(order)]
    expected = [-0.1 * weight for weight in weights]

    a, b = AdamsBashforth(order).coefficients(times, float64(0.4))

    assert float(a) == 1
    assert [float(weight) for weight in b] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_integrates_polynomials_exactly_on_uneven_steps(order):
    times = [float64(t) for t in (0.3, 0.55, 0.6, 1.0)[:order]]
    _, b = AdamsBashforth(order).coefficients(times, float64(0))
    for power in range(order):
        integral = sum(weight * time**power for weight, time in zip(b, times, strict=True))
        assert float(integral) == pytest.approx(-(0.3 ** (power + 1)) / (power + 1), rel=1e-12)
