"""What the commands of the room have in common."""

import subprocess
import sys

import pytest

from align_engine.assessment import ASSESSMENT


@pytest.mark.parametrize("name", ASSESSMENT)
def test_help_needs_no_torch(name):
    code = f"import sys; from align_engine.cli import main\ntry: main(['{name}', '--help'])\nexcept SystemExit: pass\n"
    heavy = "print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code + heavy], capture_output=True, text=True, check=True)
    assert f"usage: align {name}" in done.stdout and done.stdout.splitlines()[-1] == "[]"
