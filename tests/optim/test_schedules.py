"""Schedules against values worked out by hand."""

import pytest

from peerlm.optim import cosine, decaying_multiplier, learning_rate, set_learning_rates, wsd


def test_cosine_has_its_landmarks() -> None:
    shape = {"warmup": 0.2, "final": 0.1}
    assert cosine(0.0, **shape) == 0.0
    assert cosine(0.1, **shape) == pytest.approx(0.5)
    assert cosine(0.2, **shape) == pytest.approx(1.0)
    assert cosine(0.6, **shape) == pytest.approx(0.55)
    assert cosine(1.0, **shape) == pytest.approx(0.1)
    assert cosine(0.0, warmup=0.0, final=0.1) == 1.0
    assert cosine(1.0, warmup=1.0, final=0.1) == pytest.approx(0.1)


def test_wsd_has_its_landmarks() -> None:
    shape = {"warmup": 0.1, "decay": 0.4, "final": 0.2}
    assert wsd(0.05, **shape) == pytest.approx(0.5)
    assert wsd(0.1, **shape) == wsd(0.6, **shape) == 1.0
    assert wsd(0.8, **shape) == pytest.approx(0.6)
    assert wsd(1.0, **shape) == pytest.approx(0.2)
    assert wsd(1.0, warmup=0.1, decay=0.0, final=0.2) == 1.0


def test_a_schedule_is_found_by_its_name() -> None:
    shape = {"peak": 3e-3, "warmup": 0.1, "decay": 0.4, "final": 0.2}
    assert learning_rate("cosine", 0.7, **shape) == 3e-3 * cosine(0.7, warmup=0.1, final=0.2)
    assert learning_rate("wsd", 0.7, **shape) == 3e-3 * wsd(0.7, warmup=0.1, decay=0.4, final=0.2)
    with pytest.raises(ValueError, match='there is no schedule \'linear\': choose "cosine" or "wsd"'):
        learning_rate("linear", 0.5, **shape)


def test_multipliers_reach_one_at_the_end() -> None:
    assert [decaying_multiplier(p, start=10.0) for p in (0.0, 0.5, 1.0)] == pytest.approx([10.0, 5.5, 1.0])


def test_learning_rates_follow_the_multipliers() -> None:
    groups = [
        {"name": name, "lr_multiplier": factor}
        for name, factor in (("matrix", 1.0), ("vector", 1.0), ("table", 4.0), ("keys", 2.0))
    ]

    def rates(**settings: float) -> dict[str, float]:
        set_learning_rates(groups, 0.1, **settings)
        return {group["name"]: group["lr"] for group in groups}

    steady = {"matrix": 0.1, "vector": 0.1, "table": 0.4, "keys": 0.2}
    assert rates(progress=0.5) == pytest.approx(steady)
    assert rates(progress=0.5, table_lr_decay=True) == pytest.approx(steady | {"table": 0.25})
    assert rates(progress=1.0, table_lr_decay=True) == pytest.approx(steady | {"table": 0.1})


def test_tables_may_warm_up_longer_than_the_rest() -> None:
    groups = [{"name": name, "lr_multiplier": 0.25} for name in ("matrix", "table", "keys")]

    def rates(progress: float, **settings: float) -> list[float]:
        set_learning_rates(groups, 0.1, progress=progress, table_warmup=0.4, **settings)
        return [group["lr"] for group in groups]

    assert rates(0.0) == pytest.approx([0.025, 0.0, 0.025])
    assert rates(0.1) == pytest.approx([0.025, 0.025 / 4, 0.025])
    assert rates(0.4) == pytest.approx([0.025, 0.025, 0.025])
    assert rates(1.0) == pytest.approx([0.025, 0.025, 0.025])
    with_decay = 0.1 * decaying_multiplier(0.2, start=0.25) / 2
    assert rates(0.2, table_lr_decay=True) == pytest.approx([0.025, with_decay, 0.025])
