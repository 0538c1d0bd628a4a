"""Numbers with their intervals, as tables print them."""

NO_ESTIMATE = "no estimate"
"""What stands where an interval is wider than its value."""


def plus_minus(value: float | None, half_width: float | None, form: str) -> str:
    """A value and half of its interval, both in this form; empty without a value."""
    if value is None:
        return ""
    if half_width is None:
        return form.format(value)
    if _too_wide(value, value - half_width, value + half_width):
        return NO_ESTIMATE
    return f"{form.format(value)} ± {form.format(half_width)}"


def within(value: float, low: float, high: float, *, form: str, ends: str) -> str:
    """A value in this form, and the ends of its interval in theirs."""
    if _too_wide(value, low, high):
        return NO_ESTIMATE
    return f"{form.format(value)} ({ends.format(low)} to {ends.format(high)})"


def explained(table: str) -> str:
    """A table in Markdown, with what `NO_ESTIMATE` means below it where a cell says so."""
    note = f'\n"{NO_ESTIMATE}": the interval is wider than the value.\n'
    return table + note if f"| {NO_ESTIMATE} |" in table else table


def _too_wide(value: float, low: float, high: float) -> bool:
    return high - low > abs(value)
