"""What names an item: the space of codes, the catalogue, the trie over it."""
