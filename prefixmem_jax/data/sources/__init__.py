"""Where raw data come from, one file each: interactions and items as others publish them."""
