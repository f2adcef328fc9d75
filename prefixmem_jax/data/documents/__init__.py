"""What a training example says: one kind of document a file, any of them mixed by weight."""
