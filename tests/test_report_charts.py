"""Scales, ticks and lines of the small charts."""

from __future__ import annotations

import math

from hypothesis import example, given
from hypothesis import strategies as st

from beringia.report.charts import (
    Chart,
    Point,
    Scale,
    decimate,
    linear_ticks,
    log_range,
    log_ticks,
    nice_range,
    time_ticks,
)
from beringia.report.words import clock, duration, significant, size

finite = st.floats(min_value=-1e9, max_value=1e9, allow_nan=False)
X = Scale(0, 100_000, 50, 150)


def test_a_linear_scale_maps_its_ends_and_its_middle() -> None:
    scale = Scale(0, 10, 100, 0)
    assert (scale(0), scale(5), scale(10)) == (100, 50, 0)


def test_a_logarithmic_scale_gives_every_decade_the_same_room() -> None:
    scale = Scale(0.01, 10, 0, 300, log=True)
    assert math.isclose(scale(0.1), 100)
    assert math.isclose(scale(1), 200)


def test_values_outside_a_scale_are_drawn_at_its_edge() -> None:
    scale = Scale(0.001, 10, 0, 100, log=True)
    assert scale(0) == 0
    assert scale(math.inf) == 100


@example(values=[5e-324])
@given(values=st.lists(finite, min_size=1, max_size=20))
def test_a_nice_range_holds_every_value(values: list[float]) -> None:
    low, high = nice_range(values)
    assert low < high
    slack = 1e-6 * max(abs(low), abs(high))
    assert low - slack <= min(values)
    assert max(values) <= high + slack


@example(low=879609302.4621999, span=0.001)
@given(low=finite, span=st.floats(min_value=1e-3, max_value=1e6))
def test_linear_ticks_lie_in_the_range_with_labels_that_differ(low: float, span: float) -> None:
    ticks = linear_ticks(low, low + span)
    # A quotient and a product of float64 are two roundings, of up to an ulp of the value.
    slack = 1e-6 * span + 2 * math.ulp(abs(low) + span)
    assert all(low - slack <= value <= low + span + slack for value, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)
    assert 1 <= len(ticks) <= 7


def test_log_ticks_are_powers_of_ten() -> None:
    assert log_ticks(1e-3, 10) == [(1e-3, "10⁻³"), (0.01, "0.01"), (0.1, "0.1"), (1, "1"), (10, "10")]


def test_time_is_ticked_in_the_unit_that_reads_best() -> None:
    assert [label for _, label in time_ticks(600, 5)] == ["0", "2", "4", "6", "8", "10"]
    assert time_ticks(600, 5)[1][0] == 120


def test_a_log_range_holds_the_bound_and_stops_at_its_decades() -> None:
    low, high = log_range([1e-9, 0.3, 7.0, 0.0, math.inf], include=1.0, decades=4)
    assert math.isclose(low, 1e-4)
    assert high >= 7


def test_decimation_keeps_every_peak() -> None:
    points = [Point(x, math.sin(x / 500)) for x in range(100_000)]
    points[54_321] = Point(54_321, 9.0)
    points[77_777] = Point(77_777, -9.0)
    thin = decimate(points, X)
    assert len(thin) <= 4 * 101
    assert Point(54_321, 9.0) in thin
    assert Point(77_777, -9.0) in thin
    assert thin == sorted(thin, key=lambda point: point.x)
    assert (thin[0], thin[-1]) == (points[0], points[-1])


def test_few_points_are_not_decimated() -> None:
    points = [Point(x, 0.0) for x in range(150)]
    assert decimate(points, X) == points


def test_words_in_a_chart_are_escaped() -> None:
    chart = Chart(Scale(0, 1, 0, 10), Scale(0, 1, 10, 0), 10, 10, 'a "title" <b>')
    chart.text(0, 0, "<script>alert(1)</script>")
    chart.mark(Point(0.5, 0.5, '"><img src=x onerror=alert(1)>'), "circle", "series-1")
    svg = chart.svg()
    assert "<script" not in svg
    assert "<img" not in svg
    assert "<b>" not in svg


def test_numbers_are_written_with_the_digits_that_mean_something() -> None:
    assert significant(0.00123456) == "0.00123"
    assert significant(12_345.6) == "12,300"
    assert significant(2.4e-6, 2) == "2.4 × 10⁻⁶"
    assert significant(9.9999) == "10.0"
    assert significant(5e-324) == "4.94 × 10⁻³²⁴" and significant(-1.7976931348623157e308) == "−1.80 × 10³⁰⁸"
    assert significant(None) == "not finite"
    assert significant(-0.5) == "−0.500"


def test_durations_and_sizes_read_as_people_say_them() -> None:
    assert [duration(value) for value in (0.42, 43, 432, 11_040, 400_000)] == [
        "0.42 s",
        "43 s",
        "7 min 12 s",
        "3 h 04 min",
        "4 d 15 h",
    ]
    assert [clock(value) for value in (35.9, 724, 11_049)] == ["0:35", "12:04", "3:04:09"]
    assert [size(value) for value in (999, 5_214_332, 1_230_000_000_000)] == ["999 B", "5.21 MB", "1.23 TB"]


@given(value=st.floats(min_value=1e-300, max_value=1e300))
def test_three_digits_are_within_half_a_percent(value: float) -> None:
    words = significant(value).replace(",", "")
    mantissa, _, power = words.partition(" × 10")
    exponent = int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)
    assert math.isclose(float(mantissa) * 10.0**exponent, value, rel_tol=0.0051)
