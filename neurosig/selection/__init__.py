"""Selection: which questions are trained on, and what the teacher sees for each."""
