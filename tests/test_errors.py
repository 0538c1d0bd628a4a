"""Messages: bounded, whatever they repeat."""

import pytest

from peerlm import UserError
from peerlm.errors import MOST_CHARACTERS, listed, shortened


@pytest.mark.parametrize("length", [MOST_CHARACTERS + 1, 10**6])
def test_a_message_of_any_length_keeps_its_beginning_and_its_end(length: int) -> None:
    said = str(UserError(f"what is wrong{'x' * length}: the fix"))
    assert len(said) == MOST_CHARACTERS
    assert said.startswith("what is wrongx")
    assert said.endswith("x: the fix")


def test_a_message_that_is_not_long_is_left_alone() -> None:
    message = "x" * MOST_CHARACTERS
    assert str(UserError(message)) == message
    assert shortened("12345", 5) == "12345"


def test_lists_say_how_much_they_leave_out() -> None:
    assert listed([]) == "none"
    assert listed("abc") == "a, b, c"
    assert listed(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(range(5000), most=2) == "0, 1, and 4,998 more"
    assert len(listed(["x" * 10**6])) <= 200
