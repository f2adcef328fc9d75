"""The one exception that stands for a mistake the user can mend."""

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """A bad config, file, SID, checkpoint or flag.

    The message is one line that says what is wrong, where, and what was expected; the
    command line prints it without a traceback and exits with status 2.
    """


class Stopped(KeyboardInterrupt):
    """A signal asked to end, and it was waited until that did no harm.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def nearest(name: str, valid: Sequence[str], prefix: str = "") -> str:
    """How an error about an unknown name ends: with the valid one most like it, or all of them."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; valid here: {', '.join(valid) or 'none'}"
