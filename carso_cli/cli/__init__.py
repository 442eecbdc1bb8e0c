"""The command line: the only home of typer and rich, of printing and of exit codes."""
