"""Curves of a run from its metrics, and time to quality."""

import json

import pytest

from diffusion_moe.study.curves import POINTS, CurvePoint, curves_of, reached, read_curves


def rows(speed=64.0):
    """Lines every 10 steps of 32 images, and held-out losses every 20."""
    lines = []
    for step in (10, 20, 30, 40):
        lines.append({"step": step, "loss": 1 / step, "images_per_second": speed})
        if step % 20 == 0:
            lines.append({"step": step, "val_loss": 9.0, "val_loss_ema_0.9": 2 / step})
    return lines


def test_seconds_are_steps_times_the_logged_seconds_of_a_step():
    """32 images at 64 a second: half a second a step; the last ten steps are twice as fast."""
    lines = rows()
    lines[4]["images_per_second"] = 128.0
    curves = curves_of(lines, batch_size=32, ema_decay=0.9)
    assert [point[:3] for point in curves.held_out] == [(20, 640, 10.0), (40, 1280, pytest.approx(17.5))]


def test_the_curve_is_that_of_the_ema(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows()))
    curves = read_curves(tmp_path / "metrics.jsonl", 32, 0.9)
    assert [point.loss for point in curves.held_out] == [0.1, 0.05]
    assert curves.training == [(10, 0.1), (20, 0.05), (30, pytest.approx(1 / 30)), (40, 0.025)]
    assert curves.seconds == 20


def test_a_long_training_curve_is_means_of_neighbours():
    lines = [{"step": step, "loss": float(step), "images_per_second": 1.0} for step in range(1, 3 * POINTS + 1)]
    training = curves_of(lines, 1, 0.9).training
    assert len(training) == POINTS
    assert training[0] == (3, 2.0) and training[-1] == (3 * POINTS, 3 * POINTS - 1.0)


CURVE = [CurvePoint(10, 100, 1.0, 0.8), CurvePoint(20, 200, 3.0, 0.6), CurvePoint(30, 300, 5.0, 0.7)]


def test_a_loss_is_reached_on_the_line_between_two_points():
    assert reached(CURVE, 0.65) == pytest.approx((175.0, 2.5))
    assert reached(CURVE, 0.6) == pytest.approx((200.0, 3.0))


def test_a_loss_may_be_reached_at_once_or_never():
    assert reached(CURVE, 0.9) == (100, 1.0)
    assert reached(CURVE, 0.5) is None
