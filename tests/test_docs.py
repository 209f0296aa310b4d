"""What the documentation shows works as it stands."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_example_of_gradcache_runs_and_says_equal():
    text = (ROOT / "docs" / "gradcache.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert "12 chunks, 83% encoded twice" in found.stdout
    assert "equal to the reference" in found.stdout
    assert "transformers" not in code and "tokenizer" not in code
    assert len(text.splitlines()) <= 70
