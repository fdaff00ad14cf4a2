"""Training: the session of a run, an epoch, a step, and the state a run resumes from."""
