"""``python -m neurosig.locate``: the neurons that go with guessing, over several kinds of question and domains."""
