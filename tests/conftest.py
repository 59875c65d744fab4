"""What every test run needs: lama's choice of a device, and a compiler where that is the CPU."""

import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    # Imported here and not above: jaxtyping's import hook must be in place before anything of lama is
    # imported. Opened before a test asks tinygrad for its default, which may be OpenCL on this processor.
    from lama.runtime.device import open_device

    open_device()
