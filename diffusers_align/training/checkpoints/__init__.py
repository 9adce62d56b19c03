"""What outlives a run that is killed, and what may change when it goes on."""
