"""The paper's comparisons: which systems stand in its tables, trained and evaluated alike."""
