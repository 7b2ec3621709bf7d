from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onn import check


@given(T=st.integers(0, 5), H=st.integers(0, 5), fixed=st.integers(0, 3))
def test_shapes_that_agree_give_the_size_of_every_letter(T: int, H: int, fixed: int) -> None:
    sizes = check.shapes(
        "f",
        ("x", torch.zeros(T, H), "T H"),
        ("y", torch.zeros(H, fixed, T), f"H {fixed} T"),
        ("square", torch.zeros(H, H), "H H"),
        ("scalar", torch.zeros(()), ""),
    )
    assert sizes == {"T": T, "H": H}


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((2, 4), "T H"), ((2,), "T H"), ((2, 3, 1), "T H"), ((3,), "2"), ((), "T"), ((1,), ""), ((4, 5), "E E")],
)
def test_a_shape_that_does_not_fit_is_named_beside_all_the_others(shape: tuple[int, ...], dims: str) -> None:
    expected = f"y {list(shape)} (expected [{', '.join(dims.split())}])"
    message = f"f: shape of y does not fit: x [2, 3] (expected [T, H]), {expected}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check.shapes("f", ("x", torch.zeros(2, 3), "T H"), ("y", torch.zeros(shape), dims))


@given(value=st.floats(), low=st.floats(-3, 3), width=st.floats(0, 3))
def test_at_least_and_between_admit_exactly_their_range(value: float, low: float, width: float) -> None:
    high, refused = low + width, pytest.raises(ValueError, match=re.escape(f"x={value!r}"))
    with nullcontext() if value >= low else refused:
        check.at_least("f", "x", value, low)
    with nullcontext() if low <= value <= high else refused:
        check.between("f", "x", value, low, high)


def test_messages_name_the_argument_its_value_and_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"^f: expected k=0 >= 1\.$"):
        check.at_least("f", "k", 0, 1)
    with pytest.raises(ValueError, match=r"^f: expected 0 <= p=1\.5 <= 1\.$"):
        check.between("f", "p", 1.5, 0, 1)
    with pytest.raises(ValueError, match=r"^f: expected k=nan >= 1\.$"):
        check.at_least("f", "k", float("nan"), 1)


def test_require_raises_its_message_only_where_the_condition_fails() -> None:
    check.require(True, "never")
    with pytest.raises(ValueError, match=r"^exactly this$"):
        check.require(False, "exactly this")


def test_one_of_admits_known_names_and_suggests_the_nearest_for_others() -> None:
    known = ["softmax", "uniform", "sum"]
    for name in known:
        check.one_of("f", "combine", name, iter(known))
    suggestion = r"^f: unknown combine='softmx'; did you mean 'softmax'\?\.? Known: softmax, uniform, sum\.$"
    with pytest.raises(ValueError, match=suggestion):
        check.one_of("f", "combine", "softmx", iter(known))
    with pytest.raises(ValueError, match=r"^f: unknown combine='zzz'\. Known: softmax, uniform, sum\.$"):
        check.one_of("f", "combine", "zzz", known)


@given(names=st.lists(st.text("abcdef", min_size=3, max_size=6), min_size=1, max_size=5))
def test_the_nearest_name_to_a_known_one_is_itself(names: list[str]) -> None:
    for name in names:
        assert check.nearest(name, iter(names)) == f"; did you mean {name!r}?"
    assert check.nearest("XYZ", names) == check.nearest("abc", []) == ""
