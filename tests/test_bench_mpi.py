"""The predictions of scripts/bench_mpi.py: what they must be where the answer is known."""

from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_mpi

    return bench_mpi


def test_two_processes_send_half_of_gradients_and_parameters(bench: ModuleType):
    sizes = {"a": 3000, "b": 3000}
    gradients, parameters = bench.traffic(sizes, 2)
    assert (sum(gradients), parameters) == (4 * 3000, 4 * 3000)


def test_an_embeddings_sums_go_to_their_one_owner(bench: ModuleType):
    (gradients,), parameters = bench.traffic({"embed": 4000}, 4)
    assert gradients == pytest.approx(4 * (3000 + 3000)) and parameters == 4 * 3000


def test_one_host_takes_its_arithmetic_and_a_free_network_hides_all(bench: ModuleType):
    sizes, work = bench.sizes_of(bench.HERE), bench.Work(part=1.0, update=0.0)
    free = bench.Network(latency=0.0, speed=1e30)
    assert bench.predicted(sizes, work, free, 1, 4) == 4
    assert bench.efficiency(sizes, work, free, 8, 4) == pytest.approx(1)


@pytest.mark.parametrize("name", ["124M", "1B"])
def test_a_slower_network_needs_more_parts(bench: ModuleType, name: str):
    sizes, work = bench.sizes_of(bench.SHAPES[name]), bench.Work(part=2.0, update=0.1)
    networks = [bench.Network(50e-6, gbit * 1e9 / 8) for gbit in bench.GBITS]
    found = [bench.accumulation_for(sizes, work, network, 16) for network in networks]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]
    assert bench.efficiency(sizes, work, networks[0], 16, found[0]) >= bench.WANTED
