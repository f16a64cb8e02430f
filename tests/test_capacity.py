"""The simulated queue agrees with queueing theory, and docs/scaling.md has what the programs print."""

from __future__ import annotations

import statistics

import pytest

import capacity
import scaling
from capacity import Times, by_chance, fit, quantiles, replicas_needed, simulate_closed, simulate_open
from tests.conftest import ROOT


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_decoding_by_itself_is_the_queue_of_pollaczek_and_khinchine(
    load: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "DECODED_AT_ONCE", 1)
    found = simulate_open(Times([0.006], 0, 0), by_chance(load / 0.006, 1, "random"), 10_000)
    assert statistics.mean(found) == pytest.approx(0.006 + load * 0.006 / 2 / (1 - load), rel=0.06)


def test_two_kinds_of_work_share_a_processor() -> None:
    replica = capacity.Replica(Times([0.010], 0.020, 0), lambda request, now: left.append((request, now)))
    left: list[tuple[int, float]] = []
    replica.arrive(0)
    replica.advance(0.010)  # decoded
    replica.arrive(1)  # decoded from here to 0.030, at half the speed, beside the first batch
    replica.advance(1)
    assert [request for request, _ in left] == [0, 1]
    assert [now for _, now in left] == pytest.approx([0.040, 0.060])


def test_a_batch_forms_while_the_model_is_busy() -> None:
    times = Times([0.0], 0.010, 0.001, batch_size=8)
    assert simulate_closed(times, 1, 50) == pytest.approx((1 / 0.011, 0.011))
    rate, _ = simulate_closed(times, 16, 800)  # two batches of eight take turns
    assert rate == pytest.approx(8 / 0.018, rel=0.05)


def test_the_fit_explains_what_was_measured() -> None:
    real = Times([0.001, 0.003], 0.002, 0.0015, message_s=0.0004, request_s=0.0003, constant_s=0.0002)
    saturated, _ = simulate_closed(real, capacity.CONNECTIONS, 3000)
    _, lone = simulate_closed(real, 1, 500)
    work = lone - real.constant_s
    found = fit(Times(real.decode, 0.002, 0.0015, saturated=saturated, lone_s=lone, lone_work_s=work))
    assert found.request_s + found.message_s == pytest.approx(0.0007, rel=0.2)
    assert found.request_s == pytest.approx(0.0003, abs=0.0001)
    assert simulate_closed(found, capacity.CONNECTIONS, 3000)[0] == pytest.approx(saturated, rel=0.02)


def test_the_fewest_replicas_keep_the_limit() -> None:
    times = Times([0.004], 0, 0, saturated=250)
    replicas, _, p99 = replicas_needed(times, 1000, 20, "random", 2000)
    assert p99 <= 20
    assert quantiles(simulate_open(times, by_chance(1000, replicas - 1, "random"), 2000))[1] > 20
    in_turn, _, _ = replicas_needed(times, 1000, 20, "round-robin", 2000)
    assert 4 <= in_turn < replicas


def test_the_page_has_the_tables_of_the_programs() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    model, counts = scaling.Model(), (1e6, 1e8, 1e10)
    for name, lines in {
        "embedding": [model.embedding(count, 1) for count in counts],
        "keeping": [model.keeping(count) for count in counts],
    }.items():
        assert f"<!-- {name} -->\n{scaling.table(lines)}\n" in page
    _, p50, p99 = replicas_needed(fit(capacity.PUBLISHED), 100, 100, "round-robin", 4000)
    (line,) = [line for line in page.splitlines() if line.startswith("| 100 | 1 | ")]
    assert [float(cell) for cell in line.split("|")[4:6]] == pytest.approx([p50, p99], rel=0.1)
