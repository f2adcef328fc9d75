"""Generating SIDs."""
