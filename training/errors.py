"""Errors that the user can mend: the command line prints them in one line, without a traceback."""


class InputError(ValueError):
    """A flag, path, recipe or data file that does not make sense; the message says what would."""
