"""The SID encoder: prefix hash, sharded memory table, PrefixMem."""
