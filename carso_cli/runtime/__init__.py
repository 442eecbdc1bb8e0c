"""What every command needs around it: precision, seeds, signals, progress, third-party fixes."""
