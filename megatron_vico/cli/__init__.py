"""One small file a command: `vico COMMAND`."""
