"""The command line: flags, presets, the parser."""
