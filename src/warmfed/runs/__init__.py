"""Runs and run folders: prepare, execute, resume, verify, predict and synthesize."""
