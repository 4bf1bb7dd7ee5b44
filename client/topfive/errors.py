"""What a user can get wrong, as exceptions whose message is one sentence for that user.

Every part raises subclasses of `TopfiveError` for input, configuration and surroundings that it cannot work with. The
command line prints the sentence and exits with `exit_code`; a program catches the class.
"""

from typing import ClassVar


class TopfiveError(Exception):
    """Base of the errors that are for people: the message names the input, the limit and the way out."""

    exit_code: ClassVar[int] = 1
    """Exit status of a command that ends with this error."""
