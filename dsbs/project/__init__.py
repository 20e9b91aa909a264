"""Projects: new project folders, validation, the state of runs, machine checks."""
