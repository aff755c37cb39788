"""Every code of every small float, and every rounding between two of them."""

import pytest
import torch

from nemotron3.ops.minifloat import E2M1, E4M3, E5M2, decode, nearest, stochastic, upward

FORMATS = [E2M1, E4M3, E5M2]
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
every_format = pytest.mark.parametrize("of", FORMATS, ids=lambda f: f.name)


def numbers(of):
    """The magnitudes of a format, in order."""
    every = decode(torch.arange(of.sign, dtype=torch.uint8), of)
    return every[~every.isnan()]


def test_the_numbers_are_those_of_the_standard():
    assert numbers(E2M1).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codes = torch.arange(256).to(torch.uint8)
    for of in (E4M3, E5M2):
        known = codes.view(DTYPES[of.name]).float()
        known = torch.where(known.isfinite(), known, torch.nan)  # E5M2 has an infinity
        assert torch.equal(decode(codes, of).nan_to_num(-1), known.nan_to_num(-1))


@every_format
def test_numbers_of_the_format_stay(of):
    every = torch.cat([numbers(of), -numbers(of)[1:]])
    random = torch.rand(every.shape) * 0.998 + 0.001
    for codes in (nearest(every, of), upward(every, of), stochastic(every, of, random)):
        assert torch.equal(decode(codes, of), every)


@every_format
def test_values_between_go_to_a_neighbour(of):
    low, high = numbers(of)[:-1], numbers(of)[1:]
    middle = (low.double() + high.double()) / 2
    tie = torch.arange(len(low)) + torch.arange(len(low)) % 2
    below, above = (middle.float().nextafter(t) for t in (low, high))
    for sign, extra in ((1, 0), (-1, of.sign)):
        assert torch.equal(nearest(sign * middle.float(), of).long(), tie + extra)
        assert torch.equal(nearest(sign * below, of).long(), torch.arange(len(low)) + extra)
        assert torch.equal(nearest(sign * above, of).long(), torch.arange(len(low)) + 1 + extra)
        assert torch.equal(upward(sign * below, of).long(), torch.arange(len(low)) + 1 + extra)


@every_format
def test_nothing_overflows_and_only_nan_is_nan(of):
    beyond = torch.tensor([of.largest * 1.0001, of.largest * 2, 3e38, torch.inf])
    for round_ in (nearest, upward):
        assert (decode(round_(beyond, of), of) == of.largest).all()
        assert (decode(round_(-beyond, of), of) == -of.largest).all()
    zeros = torch.tensor([0.0, -0.0, 1e-45, -1e-45])
    assert nearest(zeros, of).tolist() == [0, 0, 0, of.sign]
    if of.nan is not None:
        assert decode(nearest(torch.tensor([torch.nan]), of), of).isnan().all()


@pytest.mark.parametrize("of", [E4M3, E5M2], ids=lambda f: f.name)
def test_nearest_is_pytorchs_cast(of):
    x = torch.randn(20_000) * torch.exp2(torch.randint(-20, 9, (20_000,)).float())
    x = x.clamp(-of.largest, of.largest)
    ours = nearest(x, of).view(DTYPES[of.name]).float()
    assert torch.equal(ours, x.to(DTYPES[of.name]).float())


@every_format
def test_the_share_rounded_up_is_the_fraction_of_a_step(of):
    low, high = numbers(of)[:-1].double(), numbers(of)[1:].double()
    grid = (torch.arange(1000) + 0.5) / 1000
    for fraction in (0.001, 0.3, 0.5, 0.9):
        x = (low + fraction * (high - low)).float()
        drawn = torch.stack([stochastic(x, of, torch.full_like(x, u)) for u in grid.tolist()])
        share = (drawn.long() - torch.arange(len(low))).double().mean(0)
        assert (share - fraction).abs().max() < 2e-3
