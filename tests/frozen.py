"""What was imported before this is here to stay: garbage collection need not look at it again."""

import gc

gc.collect()
gc.freeze()
