"""What a stage learns, one file each."""
