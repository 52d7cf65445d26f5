"""The command line: one file a group of commands; each parses, calls a run and shows its result."""
