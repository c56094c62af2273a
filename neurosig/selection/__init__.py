"""Selection: which questions to train on, and the teacher's context of each."""
