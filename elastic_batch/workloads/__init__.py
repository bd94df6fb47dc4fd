"""What the command line can train: data sets, models, recipes, and how a job file becomes a trainer."""
