"""What turns items' vectors into SIDs, one file each."""
