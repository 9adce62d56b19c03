"""Whether what somebody gave is an argument or a name, and what to say if it is none."""
