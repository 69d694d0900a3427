"""What any long multi-process program needs; it imports nothing of ours."""
