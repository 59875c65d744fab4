"""Mixed and damaged requests, the smaller form of `scripts/bench_serve.py --only load,bodies`."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="Starlette is not installed: pip install lama[serve]")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install lama[serve]")
pytest.importorskip("lama.cli.serve")
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
MODEL = str(Path(__file__).parent.parent / "weights" / "lama-bpe")


def test_mixed_traffic_gets_the_texts_of_generate(tmp_path: Path):
    from serve_faults import check_load

    report = check_load(MODEL, tmp_path, 6, [], requests=220, distinct=25, clients=20, flat=1.3)
    assert report["faults"] == []
    assert report["counts"]["good"] > 150 and report["counts"]["wrong"] > 5 and report["counts"]["leave"] > 5


def test_damaged_bodies_get_200_or_4xx(tmp_path: Path):
    from serve_faults import check_bodies

    report = check_bodies(tmp_path, 150, [])
    assert report["faults"] == []
    assert {key.split()[1][0] for key in report["counts"]} == {"2", "4"}
