"""The package is described in pyproject.toml; the native ops of csrc/ will be built from here."""

from setuptools import setup

setup()
