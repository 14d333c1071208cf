"""What a sample is worth: rewards of tasks, and of a user's own functions."""
