"""Triton's interpreter, without looking for the functions of the language again in every call.

For a launch it replaces the functions of `triton.language` by those that compute with NumPy. It does so once
more for each call of a `@triton.jit` function by another, to no effect, and every time it looks at all names
of the language to find them: a third of the time of a small kernel.
"""

import inspect

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_LANGUAGES = (tl, tl.core)
_BUILTINS: dict[object, list[str]] = {}  # package -> the names of its functions


class _Launch:
    """What is replaced while a kernel runs."""

    def __init__(self):
        self.languages, self._scopes = set(), []

    def replace(self, fn):
        """Replaces what a function uses and the launch has not replaced yet."""
        used = {
            language.__name__
            for language in _LANGUAGES
            if any(v is language for v in fn.__globals__.values())
        }
        if not used <= self.languages:
            self._scopes.append(_patch_lang(fn))
            self.languages |= used

    def restore(self):
        while self._scopes:
            self._scopes.pop().restore()
        _RUNNING.clear()


_RUNNING: list[_Launch] = []


def _replaced(fn):
    """In place of `_patch_lang`, whose scope a launch restores and a call of a device function drops."""
    if not _RUNNING:
        _RUNNING.append(_Launch())
    _RUNNING[0].replace(fn)
    return _RUNNING[0]


def _patch_builtin(package, builder, scope):
    if package not in _BUILTINS:
        _BUILTINS[package] = [n for n, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
    for name in _BUILTINS[package]:
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # it may be replaced already: the languages share their classes
            interpreter._patch_attr(package, name, member, builder, scope)


def patch_once_for_each_launch():
    """From now on, calls inside of a launch find the language as the launch made it."""
    interpreter._patch_lang, interpreter._patch_builtin = _replaced, _patch_builtin
