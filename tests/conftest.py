"""What every test run needs: a compiler for tinygrad's CPU device."""

import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    # Imported here and not above: jaxtyping's import hook must be in place before anything of lama is
    # imported.
    from lama.runtime.compiler import ensure_compiler

    ensure_compiler()
