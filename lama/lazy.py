"""Names of a package that are imported when they are first used, so that importing the package costs nothing."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`: each name of `homes` comes from the module beside it. Source: PEP 562.

    It raises LamaError where tinygrad cannot be imported because of a variable in the environment.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(homes[name]), name)
        except (ValueError, RuntimeError) as error:
            from lama.compiler import explain
            from lama.errors import LamaError

            if why := explain(error):
                raise LamaError(why) from error
            raise

    return find
