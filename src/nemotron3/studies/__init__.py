"""Claims put to the test: many short trainings of equal cost, and what they show together."""
