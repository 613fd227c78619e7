"""`python -m lmcache_core` is `lmcachectl`."""

import sys

from lmcache_core.cli import main

sys.exit(main())
