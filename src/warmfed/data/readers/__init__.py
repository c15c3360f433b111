"""One reader for each way in which images are stored."""
