"""Options of a loss are declared where they are read, and known from there."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import pytest

from align_kernels.losses.family import Family, Limit, NotNegative, Positive, Smoothing

Share = Annotated[float, Limit(lambda x: 0 < x < 0.5, "narrow needs {name}, got {value}")]


class Facts(NamedTuple):
    twice: bool = False


@pytest.fixture
def family() -> Family[Facts]:
    made = Family(Facts)

    @made.add()
    def plain(x: float, *, beta: float) -> float:
        return beta * x

    @made.add(twice=True)
    def shifted(x: float, *, beta: float, shift: NotNegative = 1.0, scale: Positive | None = None) -> float:
        return beta * x + shift + (scale or 0.0)

    @made.add()
    def shifted_back(x: float, *, shift: NotNegative = 1.0, flag: bool = False) -> float:
        return x - shift

    return made


def test_a_member_gets_what_it_takes(family):
    given = dict(beta=2.0, shift=0.5, scale=10.0, flag=True)
    assert [family(name, 3.0, **given) for name in family] == [6.0, 16.5, 2.5]
    assert family("shifted", 3.0, beta=2.0) == 7.0
    with pytest.raises(TypeError, match="'plain' takes no option 'shyft', nor does any of plain, shifted, shifted_"):
        family("plain", 3.0, beta=1.0, shyft=1.0)


def test_what_is_known_of_options(family):
    assert family.options == dict(shift=1.0, scale=None, flag=False)
    assert family.kinds == dict(shift=float, scale=float | None, flag=bool)
    assert family.readers("shift") == ["shifted", "shifted_back"]
    given = dict(beta=1.0, shift=0.5, scale=2.0, flag=True, other="x")
    assert family.read(["plain"], given) == dict(beta=1.0, other="x")
    assert family.read(["plain", "shifted"], given) == dict(beta=1.0, shift=0.5, scale=2.0, other="x")
    assert [member.facts.twice for member in family.values()] == [False, True, False]


def test_options_out_of_range_or_in_vain(family):
    family.check(["shifted"], dict(shift=0.0, scale=None, flag=False))
    for names, given, said in (
        (["shifted"], dict(shift=-1.0), "shift must not be negative, got -1.0"),
        (["plain"], dict(shift=-1.0), "shift must not be negative, got -1.0"),
        (["shifted"], dict(scale=0.0), "scale must be above 0, got 0.0"),
        (["plain", "shifted"], dict(flag=True), "flag=True is read by loss_type shifted_back, not by plain, shifted"),
        (["plain"], dict(shift=2.0), "shift=2.0 is read by loss_type shifted, shifted_back, not by plain"),
    ):
        with pytest.raises(ValueError, match=f"^{said}$"):
            family.check(names, given)
    family.check_ranges(["plain"], dict(shift=2.0))


def test_a_member_of_its_own_limit():
    family = Family(Facts)

    @family.add()
    def wide(x: float, *, share: Smoothing = 0.0) -> float:
        return x

    @family.add()
    def narrow(x: float, *, share: Share = 0.0) -> float:
        return x

    for names, value, said in ((["wide"], 0.5, r"share must lie in \[0, 0.5\)"), (["wide", "narrow"], 0.0, "narrow")):
        with pytest.raises(ValueError, match=said):
            family.check(names, dict(share=value))


def test_names_and_options_that_clash(family):
    def plain(x: float) -> float:
        return x

    plain.__module__ = "elsewhere"
    with pytest.raises(ValueError, match=r"the loss name 'plain' is taken by .*test_family.*: give elsewhere"):
        family.add()(plain)
    for bad in (dict(shift=2.0), dict(flag=True)):

        def clashing(x: float, *, shift: float = bad.get("shift", 1.0), flag: bool = bad.get("flag", False)) -> float:
            return x

        with pytest.raises(ValueError, match="of 'clashing' has another type or default than elsewhere"):
            family.add()(clashing)
    with pytest.raises(TypeError, match="thrice"):
        family.add(thrice=True)
