"""A run and its folder: prepare, execute, resume, verify, and what is made from a finished one."""
