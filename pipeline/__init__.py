"""Composes the two stages: configuration, commands, runs. The first file to open is one of `pipeline/commands/`."""
