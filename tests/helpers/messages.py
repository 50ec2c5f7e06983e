"""What the package says while something runs."""

import warnings


def warned(action):
    """What the action returns, and the warnings of this package."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [str(w.message) for w in caught if str(w.message).startswith("softprompt")]
