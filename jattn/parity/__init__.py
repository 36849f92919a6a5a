"""Equal to PyTorch, and able to show it: fixtures, comparisons, and the diff of any port."""

from jattn.parity.diffing import Report as Report
from jattn.parity.diffing import assert_matches as assert_matches
from jattn.parity.diffing import check as check
from jattn.parity.diffing import diff as diff
from jattn.parity.fixtures import Fixture as Fixture
from jattn.parity.fixtures import load as load
from jattn.parity.fixtures import save as save
from jattn.parity.recording import record as record
