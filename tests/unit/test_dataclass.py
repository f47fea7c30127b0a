"""Our dataclass does as the standard library's: each test runs with both."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any, ClassVar

import pytest

from vnet_lock import dataclass as ours

BOTH = pytest.mark.parametrize("by", [dataclasses, ours], ids=["dataclasses", "vnet_lock.dataclass"])


def make(by: ModuleType, **options: bool) -> Any:
    @by.dataclass(slots=True, **options)
    class Port:
        """A class as ours are."""

        speeds: ClassVar[tuple[int, ...]] = (10, 25)

        name: str
        queues: int = 1
        macs: list[str] = by.field(default_factory=list)

        @property
        def text(self) -> str:
            return f"{self.name} x{self.queues}"

    return Port


@BOTH
def test_fields_are_given_by_place_or_name_and_have_defaults(by: ModuleType) -> None:
    made = make(by)
    one, other = made("a"), made(name="a", queues=2)
    assert (one.name, one.queues, one.macs, one.text) == ("a", 1, [], "a x1")
    assert (other.queues, made.speeds) == (2, (10, 25))
    one.macs.append("52:54:00:00:00:01")
    assert made("a").macs == []
    one.queues = 4
    assert one.text == "a x4"
    for wrong in ((), ("a", 1, [], 1)):
        with pytest.raises(TypeError, match=r"__init__\(\)"):
            made(*wrong)
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        made("a", speed=1)


@BOTH
def test_objects_have_slots_and_a_repr(by: ModuleType) -> None:
    one = make(by)("a")
    assert repr(one) == "make.<locals>.Port(name='a', queues=1, macs=[])"
    with pytest.raises(AttributeError):
        one.speed = 1
    match one:
        case object(name=str(name)):
            assert name == "a"
    assert type(one).__match_args__ == ("name", "queues", "macs")
    assert type(one).__doc__ == "A class as ours are."


@BOTH
def test_what_is_frozen_cannot_change_and_has_a_hash(by: ModuleType) -> None:
    made = make(by, frozen=True)
    one = made("a", macs=())
    with pytest.raises(AttributeError):
        one.name = "b"
    with pytest.raises(AttributeError):
        del one.name
    assert hash(one) == hash(made("a", macs=()))
    assert {one: 1}[made("a", 1, ())] == 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(make(by)("a"))


@BOTH
def test_equal_are_those_of_one_class_with_equal_fields(by: ModuleType) -> None:
    made = make(by, frozen=True)
    assert made("a") == made("a")
    assert made("a") != made("b")
    assert made("a") != make(by, frozen=True)("a")
    assert made("a") != ("a", 1, [])
    with pytest.raises(TypeError):
        made("a") < made("b")  # noqa: B015


@BOTH
def test_an_order_is_that_of_the_fields(by: ModuleType) -> None:
    made = make(by, frozen=True, order=True)
    a, b = made("a", 2), made("b", 1)
    assert a < b
    assert a <= made("a", 2) >= a
    assert b > a
    assert sorted([b, a]) == [a, b]
    with pytest.raises(TypeError):
        a < ("b", 1, [])  # noqa: B015


@BOTH
def test_a_class_without_fields_has_one_value(by: ModuleType) -> None:
    @by.dataclass(frozen=True, slots=True)
    class Nothing:
        pass

    assert Nothing() == Nothing()
    assert len({Nothing(), Nothing()}) == 1


@pytest.mark.parametrize("replace", [dataclasses.replace, ours.replace], ids=["dataclasses", "ours"])
@BOTH
def test_a_copy_has_other_values(by: ModuleType, replace: Any) -> None:
    made = make(by, frozen=True)
    one = made("a", 2)
    other = replace(one, name="b")
    assert (other.name, other.queues, other.macs is one.macs) == ("b", 2, True)
    with pytest.raises(TypeError):
        replace(one, speed=1)


def test_fields_are_told() -> None:
    told = [(one.name, one.type) for one in ours.fields(make(ours))]
    assert told == [("name", "str"), ("queues", "int"), ("macs", "list[str]")]
