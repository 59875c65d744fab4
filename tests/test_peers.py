"""CI installs the peers and runs `pytest -m peers`: a test that needs one and lacks the mark would never run.

Tests that only `pytest -m slow` runs are marked so instead.
"""

import ast
import re
from pathlib import Path

NEEDS_PEER = re.compile(r"importorskip\(.(torch|transformers|tokenizers|transformer_lens)\b|\btransformers: ")


def test_tests_that_need_a_peer_carry_the_mark():
    found = 0
    for path in Path(__file__).parent.glob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            tests = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            if tests and NEEDS_PEER.search(ast.get_source_segment(source, node) or ""):
                found += 1
                marks = {ast.unparse(mark) for mark in node.decorator_list}
                assert marks & {"pytest.mark.peers", "pytest.mark.slow"}, f"{path.name}: {node.name}"
    assert found > 10
