"""How weights get from the learner to those who sample: immutable versions, whole or as what has changed."""
