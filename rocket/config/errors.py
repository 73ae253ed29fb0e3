"""The one exception that means: the input is at fault, and here is what to do about it."""


class RocketError(Exception):
    """A mistake in the user's input, told in one line that names the thing, its value and the remedy.

    Command line tools print the line and exit with code 2; nothing written before is lost.
    """


def first_line(error: Exception) -> str:
    """The first line of another library's message, to quote in one of ours; the beginning of it if it is long.

    >>> first_line(ValueError("no such tensor\\nStack: ..."))
    'no such tensor'
    """
    return str(error).strip().split("\n")[0][:300]
