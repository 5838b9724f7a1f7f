"""What a run does: Lightning modules over search and evaluation, and the data they draw."""
