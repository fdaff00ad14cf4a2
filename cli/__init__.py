"""The command line: flags, how a program ends, log lines, metrics, pictures."""
