"""The stages of dvc.yaml: a module each, named like the stage and its command."""
