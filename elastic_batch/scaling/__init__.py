"""Where workers come from: processes of this machine, started ahead, replaced when they die. No torch in here."""
