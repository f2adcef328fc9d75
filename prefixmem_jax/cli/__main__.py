import sys

from prefixmem_jax.cli import main

sys.exit(main())
