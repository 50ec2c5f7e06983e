"""The one error of bad input: tables, templates and folders that cannot be used as given."""


class TaskError(ValueError):
    """Input that cannot be used as given; the message names the problem and the remedy in one sentence."""
