"""The README is true: the code makes its table, its pictures exist, its examples are doctests."""

import re
from pathlib import Path

from jattn.parity import fixtures, systems

ROOT = Path(__file__).parent.parent


def test_the_table_is_the_one_of_the_systems():
    proofs = map(fixtures.load, (ROOT / "tests" / "fixtures").glob("*/*.safetensors"))
    assert systems.markdown(proofs).strip() in (ROOT / "README.md").read_text()


def test_every_picture_and_link_of_the_readme_exists():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
