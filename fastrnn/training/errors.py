"""The one error of bad input: the command line shows its words without a traceback."""


class InputError(ValueError):
    """Data, a checkpoint or a setting that cannot be used; the message says what and where."""
