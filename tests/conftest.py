"""The lecture's own data file is not ours to ship: the tests of it run where FUSED_OPS_SEED_NAMES names a copy."""

import os

collect_ignore = [] if os.environ.get("FUSED_OPS_SEED_NAMES") else ["test_seed.py"]
