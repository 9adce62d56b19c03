"""How an unmodified pipeline is walked, step by step: its calls, its scheduler's steps, what is known of it, what a call leaves as it was."""
