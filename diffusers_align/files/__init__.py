"""Where files lie that users name, and how those are written that they keep."""
