"""The command `elastic-batch`, one file for each subcommand; each is imported only when it is used."""
