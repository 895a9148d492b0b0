"""The commands for people: a module each, named like the command."""
