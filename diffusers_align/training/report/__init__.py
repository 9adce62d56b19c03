"""What a run leaves for people: evaluations, pictures, comparisons, the model card, the Hub."""
