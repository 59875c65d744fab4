"""Loading GPT-2 124M: the weights in memory, one tensor beside them, and no second copy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reference import random_gpt2

LOAD = """
import json, sys, time
from tinygrad import Tensor
from lama.checkpoints import load_model
from lama.models.gpt import GPT
from lama.models.registry import n_parameters

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

Tensor.empty(1).uop.buffer.ensure_allocated()  # opens the device
base, start = status("VmRSS"), time.perf_counter()
model = load_model(sys.argv[1])
seconds, size = time.perf_counter() - start, status("VmHWM") - base
print(json.dumps({"seconds": seconds, "bytes": size, "parameters": n_parameters(model)}))
"""


@pytest.fixture(scope="module")
def weights() -> random_gpt2.Weights:
    return random_gpt2.make_weights(random_gpt2.make_config())


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    "write", [random_gpt2.write_safetensors, random_gpt2.write_torch, random_gpt2.write_torch_legacy]
)
def test_load_holds_one_tensor_beside_the_weights(tmp_path: Path, weights, write):
    random_gpt2.write_folder(tmp_path, random_gpt2.make_config(), weights, write)
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    measured = json.loads(result.stdout)
    assert measured["parameters"] == 124_439_808
    total, largest = 4 * measured["parameters"], 4 * 50257 * 768
    # What is over: code that loading imports, tinygrad's caches.
    assert total < measured["bytes"] < total + largest + (48 << 20)
    assert measured["seconds"] < 10  # about 1 on an idle machine
    for file in tmp_path.iterdir():
        file.unlink()
