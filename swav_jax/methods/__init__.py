"""What is learned: a method a file."""
