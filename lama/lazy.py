"""Lazy names of a package, so that importing the package costs nothing."""

import importlib
from collections.abc import Callable, Mapping


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """A package's `__getattr__`, which imports each name of `homes` from its module. Source: PEP 562.

    It raises LamaError if an environment variable keeps tinygrad from being imported.
    """

    def find(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(homes[name]), name)
        except (ValueError, RuntimeError) as error:
            from lama.errors import LamaError
            from lama.runtime.compiler import explain

            if why := explain(error):
                raise LamaError(why) from error
            raise

    return find
