"""What a run leaves behind: its record, its report, its adapter and the words about it."""
