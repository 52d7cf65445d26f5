"""Checkpoint layouts, in and out."""
