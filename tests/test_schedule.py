"""Laws of the schedule."""

from __future__ import annotations

import pytest
import torch

from tstitch.diffusion import space_timesteps
from tstitch.errors import InputError
from tstitch.schedule import Leg, StitchSchedule, three_way_allocations, two_way_ratios


@pytest.mark.parametrize("num_steps", [1, 4, 7, 10, 50, 250])
@pytest.mark.parametrize("schedule", [*two_way_ratios(), *three_way_allocations()], ids=str)
def test_legs_cover_every_step_once_and_no_denoiser_comes_back(schedule: StitchSchedule, num_steps: int) -> None:
    legs = schedule.legs(num_steps)
    assert [i for leg in legs for i in range(leg.start, leg.stop)] == list(range(num_steps))
    assert len({leg.denoiser for leg in legs}) == len(legs)
    for leg in legs:
        assert {schedule.denoiser_at(i, num_steps) for i in range(leg.start, leg.stop)} == {leg.denoiser}


def test_the_documented_example() -> None:
    s = StitchSchedule((0.4, 0.2, 0.4))
    assert s.legs(100) == [Leg(0, 0, 40), Leg(1, 40, 60), Leg(2, 60, 100)]
    assert s.denoiser_at(57, 100) == 1
    assert s.denoiser_at_progress(0.57) == 1
    assert StitchSchedule.from_ratio(0.4).describe(["S", "XL"]) == "S:40 XL:60"


@pytest.mark.parametrize("ratio", [k / 10 for k in range(11)])
@pytest.mark.parametrize("num_steps", [1, 3, 10, 20, 50, 250])
def test_a_ratio_is_the_floor_of_its_share_of_the_steps(ratio: float, num_steps: int) -> None:
    small = sum(leg.stop - leg.start for leg in StitchSchedule.from_ratio(ratio).legs(num_steps) if leg.denoiser == 0)
    assert small == int(round(ratio * 10) * num_steps // 10)


def test_progress_agrees_with_steps_wherever_the_share_is_a_whole_number_of_steps() -> None:
    for schedule in three_way_allocations():
        assert [schedule.denoiser_at_progress(i / 10) for i in range(10)] == [schedule.denoiser_at(i, 10) for i in range(10)]


def test_a_denoiser_may_come_back_when_the_order_says_so() -> None:
    assert StitchSchedule((0.2, 0.6, 0.2), order=(0, 1, 0)).legs(10) == [Leg(0, 0, 2), Leg(1, 2, 8), Leg(0, 8, 10)]


@pytest.mark.parametrize("spec", ["10", "50", "ddim10", "ddim25", "7"])
def test_the_rule_by_t_is_the_published_one_for_three_models(spec: str) -> None:
    timesteps = space_timesteps(1000, spec)[::-1]
    for schedule in three_way_allocations():
        milestones = torch.tensor(schedule.fractions).cumsum(0)
        expected = [next((k for k, m in enumerate(milestones) if not 1 - t / 1000 > m), 2) for t in timesteps]
        owners = [leg.denoiser for leg in StitchSchedule(schedule.fractions, switch_by="t").legs(len(timesteps), timesteps) for _ in range(leg.start, leg.stop)]
        assert owners == expected, schedule


def test_sigma_and_snr_thresholds_say_the_same_thing() -> None:
    sigmas = [80.0, 20.0, 5.0, 2.0, 1.0, 0.5, 0.1]
    by_sigma = StitchSchedule.from_thresholds([5.0, 0.7], "sigma").legs(7, sigmas=sigmas)
    by_snr = StitchSchedule.from_thresholds([1 / 4.9**2, 1 / 0.7**2], "snr").legs(7, sigmas=sigmas)
    assert by_sigma == by_snr == [Leg(0, 0, 3), Leg(1, 3, 5), Leg(2, 5, 7)]


@pytest.mark.parametrize("schedule", [StitchSchedule((0.1, 0.9)), StitchSchedule((0.2, 0.6, 0.2), (0, 1, 0), "t"), StitchSchedule.from_thresholds([3.0])])
def test_json_gives_the_schedule_back(schedule: StitchSchedule) -> None:
    assert StitchSchedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: StitchSchedule.from_ratio(1.1), "ratio must lie in"),
        (lambda: StitchSchedule.from_ratio(float("nan")), "ratio must lie in"),
        (lambda: StitchSchedule((0.5, 0.4)), "sum to 0.9"),
        (lambda: StitchSchedule((1.5, -0.5)), "each lie in"),
        (lambda: StitchSchedule(()), "no fractions"),
        (lambda: StitchSchedule((0.5, 0.5), order=(0,)), "order"),
        (lambda: StitchSchedule((0.5, 0.5), switch_by="time"), "choose from"),
        (lambda: StitchSchedule.from_thresholds([1.0, 2.0], "sigma"), "descending"),
        (lambda: StitchSchedule((0.5, 0.5)).legs(0), "at least 1"),
        (lambda: StitchSchedule((0.5, 0.5), switch_by="t").legs(4), "timesteps"),
        (lambda: StitchSchedule((1.0,)).denoiser_at(4, 4), "not in 0..3"),
        (lambda: StitchSchedule.from_json('{"ratio": 1}'), "not a stitch schedule"),
    ],
)
def test_contradictions_are_refused_with_a_reason(make, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()
