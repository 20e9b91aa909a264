"""What stands around the stages: a new project, the runs there are, a recipe looked at, the machine, the editor's schema."""
