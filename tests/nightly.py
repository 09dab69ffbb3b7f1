"""Whether this is ``make nightly``: hundreds of kills for a few, thousands of made-up inputs, longer runs."""

import os

NIGHTLY = bool(os.environ.get("NORMFREE_NIGHTLY"))
