"""The recipes that ship, as YAML below one folder a stage."""
