"""The loss scale finds the largest power of two without overflow in float16."""

from vp_train.optim.loss_scale import LossScale


def test_it_halves_after_every_failure_and_doubles_after_a_thousand_finite_steps():
    scale = LossScale.of("float16")
    first = scale.value
    assert first == 65536.0  # as torch's GradScaler: just above what float16 can hold
    assert scale.failed()
    assert scale.value == first / 2
    for _ in range(999):
        scale.passed()
    assert scale.value == first / 2
    assert scale.failed()
    for _ in range(1000):
        scale.passed()
    assert scale.value == first / 2


def test_a_loss_that_is_not_scaled_any_more_cannot_be_helped():
    scale = LossScale.of("float16")
    while scale.value > 1:
        assert scale.failed()
    assert not scale.failed()


def test_other_dtypes_are_not_scaled():
    for dtype in ("bfloat16", "float32", "float64"):
        scale = LossScale.of(dtype)
        for _ in range(2000):
            scale.passed()
        assert scale.value == 1.0
        assert not scale.failed()
