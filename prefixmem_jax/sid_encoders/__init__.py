"""What fills the SID slot: token ids to a vector per position, one file each."""
