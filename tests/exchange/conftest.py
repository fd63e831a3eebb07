"""Real results of the commands, made once."""

from __future__ import annotations

import pytest
from real_results import Results, make_results

from lustral.vision.records import Victim


@pytest.fixture(scope="session")
def results(backdoored: Victim, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return make_results(tmp_path_factory.mktemp("results"), backdoored)
