"""The client's commands: a file a group of them. Each imports what it needs when it runs; `--help` needs nothing."""
