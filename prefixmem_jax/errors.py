"""The one exception that stands for a mistake the user can mend."""


class UserError(Exception):
    """A bad config, file, SID, checkpoint or flag.

    The message is one line that says what is wrong, where, and what was expected; the
    command line prints it without a traceback and exits with status 2.
    """
