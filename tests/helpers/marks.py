"""Which cases of a parametrization `make test` runs, and which it leaves to `make test-slow`."""

import pytest


def slow_unless(quick, cases):
    """The cases as parameters; those for which `quick` is false are marked slow.

    Args:
        quick: a function of a case, or a collection of cases.
        cases: values of one argument, or tuples of values of several.
    """
    is_quick = quick if callable(quick) else quick.__contains__

    def parameter(case):
        values = case if isinstance(case, tuple) else (case,)
        return pytest.param(*values, marks=[] if is_quick(case) else pytest.mark.slow)

    return [parameter(case) for case in cases]
