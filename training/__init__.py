"""Training: the session of a run, an epoch, a step, and what a run resumes from."""
