"""Measured claims, each runnable by a user."""
