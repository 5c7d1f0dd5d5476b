"""The list of deliberate errors (`python tests/mutations.py` plants them) still fits the code and the tests."""

import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS, ROOT, planted


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_it_can_be_planted(mutation):
    text = (ROOT / "pyrovae" / mutation.file).read_text()
    wrong = planted(text, mutation)
    assert wrong != text
    compile(wrong, mutation.file, "exec")
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in (Path(ROOT) / file).read_text(), f"{test} is not there"


def test_their_names_differ():
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS) >= 12


def test_the_command_itself_runs():
    done = subprocess.run([sys.executable, ROOT / "tests/mutations.py", "no", "such"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "no planted error has no and such in its name\n"
    assert done.stderr == ""
