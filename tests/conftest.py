"""What holds for all tests: random inputs are the same in every run, so that a failure is the change's own.

`HYPOTHESIS_PROFILE=explore` looks further, with other inputs in each run.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
