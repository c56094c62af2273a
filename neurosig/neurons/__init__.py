"""FFN neurons of a model: where they are, what they contribute, and how they are traced."""
