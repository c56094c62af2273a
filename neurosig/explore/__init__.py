"""A notebook's way in: trace texts, look at their neurons, change them."""
