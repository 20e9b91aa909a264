"""Around the stages: new projects, validation, the state of runs, checks of the machine."""
