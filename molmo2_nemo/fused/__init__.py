"""Fast twins of the plain functions that a step spends its time in, and the choice among them (choice.py)."""
